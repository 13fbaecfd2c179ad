"""Public evaluation sets: what a model answers, measured as MiMo-Audio's report measures it.

    sets/        one reader a set: its files as they are published -> items
    items.py     an item, its answer, what measures an answer, what a set is
    rates.py     words: MiMo-Audio-Eval's normalisation, mean of utterances and rate of the corpus
    plugins.py   recognisers, speaker encoders and judges, by import path or URL
    run.py       items answered as rows of one batch, then measured; both resume
    report.py    the table, with published scores beside it, and its JSON

Source: MiMo-Audio-Eval (XiaomiMiMo, Apache-2.0), commit d64df78.
"""
