def write_pages(results, out):
    return []
