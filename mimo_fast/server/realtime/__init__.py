"""Realtime sessions: speech in and out over one connection.

sockets.py   carries events over a WebSocket           client_secrets.py
calls.py     WebRTC calls: their endpoints             peer.py  speaker.py
openai.py    the wire: GA events                       config.py  events.py
dialogue.py  the session core, which knows no wire: turns, speculation, barge-in, items
hearing.py   audio in -> where somebody speaks         sound.py   bytes <-> samples
mind.py      what is computed with the model           items.py   the conversation
"""
