"""Talking to a model: microphone and speaker at one end, a dialogue at the other.

card.py  files.py   where samples come from and go to    player.py  what is being heard
partner.py          what a dialogue is: local.py in this process, remote.py at a server
talk.py             one talk: states, interruption, latencies
screen.py  keys.py  the terminal                         echo.py    echo cancellation
"""
