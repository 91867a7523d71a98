"""The accuracy benchmark: all contenders trained on the same tasks, at several learning rates and with several seeds.

    python -m benchmarks.accuracy                         continue where the last run stopped
    python -m benchmarks.accuracy --budget-minutes 30     the same, but start nothing after half an hour
    python -m benchmarks.accuracy --quick                 one small cell, into a temporary file
    python -m benchmarks.accuracy --real                  the same on real images; also with these options:
        --data DIR                 the files of Fashion-MNIST; apt-get install dataset-fashion-mnist installs them
        --only "batch 4 of"        only cells whose description contains this
        --contenders "A;B"         only these contenders
    python -m benchmarks.accuracy --report                docs/accuracy.md and docs/accuracy.png from the committed data
    python -m benchmarks.accuracy.published               small versions of two published tables

There are two grids of cells. The quick grid uses scikit-learn's digits: `tasks` has the data, `networks` the models,
`grid` the cells. The other grid uses real images and series: `fashion` and `series` read the data, and `tasks_real`,
`networks_real` and `grid_real` correspond to the modules of the quick grid. `pretrained` has the networks that are
fine-tuned.

`contenders` has the layers, `rivals` published layers of others, `conversions` the conversion of pretrained networks.
`jobs` defines a run, `run` carries it out, and `train` has the training loop. Results are lines of JSON in
benchmarks/results/accuracy.jsonl and real_images.jsonl. A line is appended when a contender has finished a cell.

A run trains a stack: the models of all learning rates and seeds at once, concatenated along the channels. Convolutions
are grouped by model, and normalisation is per channel or per group, so the models are independent. The gradients of
the summed loss are those of each model alone. On the digits this takes about a sixth of the time, and the results equal
those of single runs up to rounding.

All contenders see the same batches and start from the same weights. They see the same number of samples at every batch
size, 1088 digits or 5000 garments, at a learning rate that falls to zero linearly. (At a constant rate the results of
two seeds differed by 3 points, too much to distinguish contenders.)
"""
