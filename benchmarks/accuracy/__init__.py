"""The accuracy benchmark: everybody trained on the same tasks, at several learning rates, with several seeds.

    python -m benchmarks.accuracy                         go on where the last run stopped
    python -m benchmarks.accuracy --budget-minutes 30     ... and start nothing after half an hour
    python -m benchmarks.accuracy --quick                 one small cell, into a temporary file
    python -m benchmarks.accuracy --real                  the same on real images; also with these options:
        --data DIR                 the files of Fashion-MNIST; apt-get install dataset-fashion-mnist gets them
        --only "batch 4 of"        only cells that are described so
        --contenders "A;B"         only these
    python -m benchmarks.accuracy --report                docs/accuracy.md and docs/accuracy.png from the committed data
    python -m benchmarks.accuracy.published               two published tables in small

There are two grids of cells. The quick one is of scikit-learn's digits: `tasks` has the data, `networks` the models,
`grid` the cells. The other is of real images and series: `fashion` and `series` read them, `tasks_real`,
`networks_real` and `grid_real` are their counterparts, `pretrained` has what is fine-tuned.

`contenders` has the layers, `rivals` those that others published, `conversions` what becomes of pretrained nets,
`jobs` says what a run is, `run` makes it, `train` trains.
Results are lines of JSON in benchmarks/results/accuracy.jsonl and real_images.jsonl, one per cell and contender,
appended when it is done.

A run trains a stack: all learning rates and all seeds at once, side by side along the channels. Convolutions are
grouped by model, and normalisation is per channel or per group, so no model knows of another; the gradients of the
summed loss are those of each alone. On the digits it takes about a sixth of the time, and agrees with single runs up to
rounding.

Everybody sees the same batches from the same initial weights: as many samples whatever the batch size, 1088 digits or
5000 garments, at a rate that falls to zero linearly. (At a constant rate the results of two seeds differed by 3 points,
too many to tell anybody apart.)
"""
