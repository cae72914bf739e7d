"""Label tables: `labels.read_labels` and `residue_labels.read_residues` check a file row by row, `splits.make_split`
deals its rows so that the test part tells about new proteins."""
