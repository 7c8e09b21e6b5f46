"""Protocols, recognised and parsed from the heads of messages; pure, without state, vectorised.

Used twice: while recording, to tell what may be stored (`keep`), and in the analysis of a recording.
"""
