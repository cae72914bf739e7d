"""The scripts that make what the package ships, from the data to the bundles: backbone, heads, checks."""
