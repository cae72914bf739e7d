"""The service on Ray: `deployment.build` makes the Serve application, `running.run` is `bioseq serve`."""
