"""Gunicorn's settings that are the same for every start of the shop (service.py gives the rest)."""

# Since 25.1 gunicorn opens a control socket at one fixed place in the user's home or runtime
# directory: two shops would fight over it, and it would outlive the temporary directory.
# Older versions ignore a name that they do not know here, but refuse an unknown option.
control_socket_disable = True

# Shorter than the time after which service.py kills the whole process group.
graceful_timeout = 3
timeout = 30
