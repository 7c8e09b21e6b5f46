"""Writes spans in the formats of other tools: OpenTelemetry's protocol and Perfetto's traces."""
