"""What each format of a checkpoint costs and gains on this machine: `mimo-fast quality`.

material.py   recordings with their words, and texts
heads.py      KL and agreement of every head
codecs.py     the codec in int8, streams beside one-shot decoding, look-aheads
formats.py    what one format hears and says, its speed and memory
judged.py     words, voice and sound of what was said
losses.py     what a format loses beside the full one, with a 95% interval
advice.py     the rule by which one format is named
measure.py    all of it, one model after the other
report.py     Markdown; plots.py: pictures
"""
