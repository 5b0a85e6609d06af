"""What monitoring reads: a line of the log for every call, Prometheus and OpenTelemetry.

Nothing here is imported, and neither are their libraries, before somebody uses it.
"""
