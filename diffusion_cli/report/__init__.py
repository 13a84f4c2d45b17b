"""The page of runs: folders are read, thinned to a budget and written as one HTML file. Free of torch and of any network."""
