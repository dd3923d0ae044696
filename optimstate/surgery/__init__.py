"""The verbs on checkpoint files, a module each: inspect, diff, remap, convert, name, verify, scan, suggest, plans.

The functions are reached as `optimstate.inspect` and so on; the command line only renders the reports they return. None
of them imports torch unless elements of a tensor must be rearranged, and none executes anything from a file.
"""
