"""Trains `nano`, a small checkpoint pair of MiMo-Audio's architecture, on synthesized speech.

    python -m training all      data, codec, decoder, codes, language model, export, evaluation and
                                model card, into training_output/; its nano/ is what the package
                                ships as mimo_fast/assets/nano
    python -m training all --start mimo_fast/assets/nano
                                the same, starting from the weights in the package
    python -m training vocoder --start mimo_fast/assets/nano
                                a vocoder of the published depth over nano's codec, to measure
                                streams with (`vocoder.py`); an hour on one core
    python -m training hearing --start mimo_fast/assets/nano
                                its language model further, mostly on what it hears: noise, rooms,
                                telephones, silence, levels; an hour and a half on two cores
    python -m training confidence --start mimo_fast/assets/nano --foreign DIR
                                calibrates how confident it is of its replies (`confidence.py`)
    python -m training sets -o DIR
                                the held-out sentences as evaluation sets (`sets.py`), for
                                `mimo-fast eval`
    python -m training --smoke  a few steps of everything

Each command resumes where it was stopped, and `decoder` and `lm` may run side by side, each on a
core (`--workers 1 --threads 1`). The modules are the package's own; this folder has only data,
losses and loops. The extra is `pip install '.[training]'`, and speech needs the Debian packages
flite, festival, festvox-kdlpc16k and espeak-ng.

Sizes were chosen by counting. A step of training costs 6 FLOP a parameter and position (2 forward,
4 backward), and two CPU cores give some 60 GFLOP/s on matrices of these widths, 2e14 an hour.

    codec, 3.57 M parameters                         positions a second     FLOP a second of speech
      encoder 1.04 M, decoder 1.04 M                                 50                     0.62 G
      vocoder and its head 0.89 M                                   100                     0.54 G
      convolutions 0.35 M, codebooks 0.25 M                      50, 25                     0.11 G
    a step: 4 utterances of 1.65 s decoded again, 16 only encoded, 19 GFLOP; 3,600 steps: 0.7e14
    a step of the decoder alone: 3 utterances, 3.7 GFLOP; 10,800 steps: 0.4e14

    language model, 4.39 M parameters                positions an example         FLOP an example
      backbone 2.36 M                                                37                     0.52 G
      patch decoder 0.89 M, 11 steps a patch                    6.7 x 11                     0.39 G
      patch encoder 0.39 M, 4 frames a patch                     14 x 4                     0.10 G
      code heads 0.25 M, text head 0.26 M                        6.7, 11                     0.06 G
    a step: 16 examples, 17 GFLOP, of understanding alone 10; 10,300 steps: 1.7e14

Attention, norms, spectra and the optimizer come on top and cost about as much again. Both together
are 7.96 M parameters, 15.9 MB in float16; the export writes the text head twice, 0.5 MB more. The
vocoder has 2 layers that look 8 frames ahead each: 160 ms, one patch, is the delay that it adds for
a listener.
"""
