"""An engine: predictors in memory, and a queue that batches requests by tokens.

`host.Host` answers an `asks.Ask` with a `Reply`; `link` reaches a host in this process or behind Ray Serve;
`catalogue` turns names into exact versions.
"""
