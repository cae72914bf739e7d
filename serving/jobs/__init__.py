"""Jobs and files of the API: pretrain, finetune and screen runs on the cluster that serves.

    routes  ->  store (database)  <-  scheduler  ->  executor (Ray Jobs)  ->  runner  ->  python -m bioseq KIND
                                                                             (job folder: log, progress, exit)

The database is the truth about states, the job's folder about what a run did. The scheduler alone moves jobs
from PENDING on; it holds a lease, and every one of its writes checks that it still does. Each start of a job
is an *attempt* with a number that only grows: what an older attempt does no longer counts.
"""
