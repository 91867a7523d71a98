"""The accuracy benchmark: everybody trained on the same tasks, at several learning rates, with several seeds.

    python -m benchmarks.accuracy                         go on where the last run stopped
    python -m benchmarks.accuracy --budget-minutes 30     ... and start nothing after half an hour
    python -m benchmarks.accuracy --quick                 one small cell, into a temporary file
    python -m benchmarks.accuracy --report                docs/accuracy.md and docs/accuracy.png from the committed data
    python -m benchmarks.accuracy.published               two published tables in small

`tasks` has the data, `networks` the models, `contenders` the layers, `experiments` what was tried
on the way to the defaults, `grid` the cells and their order, `train` one run. Results are lines of JSON in
benchmarks/results/accuracy.jsonl, one per cell and contender, appended when it is done.

A run trains a stack: all learning rates and all seeds at once, side by side along the channels. Convolutions are
grouped by model, and normalisation is per channel or per group, so no model knows of another; the gradients of the
summed loss are those of each alone. It takes about a sixth of the time, and agrees with single runs up to rounding.

Everybody sees the same batches from the same initial weights: 1088 images whatever the batch size, at a rate that falls
to zero linearly. (At a constant rate the results of two seeds differed by 3 points, too many to tell anybody apart.)
"""
