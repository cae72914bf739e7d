"""Wire types, one file a resource. pydantic lives here and in the routes, nowhere else."""
