"""The small grammar of filters, ranks and objectives over a table's columns, compiled to SQL."""
