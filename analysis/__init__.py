"""Turns a recording into messages, spans, requests and findings, on any machine."""
