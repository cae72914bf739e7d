"""The only way through a model: what is asked (`query`), how it is batched and run, and what comes of it.

`loading.load` gives a `predictor.Predictor`. HTTP, the command line, screening and the Python API all end there.
`variants` plans scores and scans, `scoring` runs such plans here. Importing this room loads nothing.
"""
