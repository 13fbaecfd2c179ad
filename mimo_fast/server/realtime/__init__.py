"""Realtime sessions: speech in and out over one connection.

openai.py    the wire: GA events over a WebSocket      config.py  events.py
dialogue.py  the session core, which knows no wire: turns, speculation, barge-in, items
hearing.py   audio in -> where somebody speaks         sound.py   bytes <-> samples
mind.py      what is computed with the model           items.py   the conversation
"""
