"""`batchnormify`: which layers of a model can be converted, the classes that they get, and the conversion."""
