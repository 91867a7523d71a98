"""`batchnormify`: the convertible layers of a model, the classes they are converted to, and the conversion."""
