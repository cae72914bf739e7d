"""Jobs and files of the API: routes -> store (database) <- scheduler -> executor -> runner -> python -m bioseq KIND.

The database holds the states, a job's folder what its run did. Only the scheduler moves jobs on from PENDING; it holds
a lease that every write checks. Each start is an *attempt*, and what an older attempt does is ignored.
"""
