"""Reports: one offline HTML file each, of the same parts, with pictures inside and no scripts.

page     tiles, tables, pictures and folded texts -> a page; `style` for a template of one's own
"""
