#!/bin/sh
# as_owner.sh COMMAND...: runs a command as the owner of this checkout.
#
# `sudo make setup` in a user's checkout must not leave root's files there: the user could neither
# rebuild nor delete them. Nothing changes when nobody, or root, would be handed anything.
set -eu

checkout=$(cd "$(dirname "$0")/.." && pwd)
owner=$(stat -c %u "$checkout")
group=$(stat -c %g "$checkout")

if [ "$(id -u)" -ne 0 ] || [ "$owner" -eq 0 ]; then
    exec "$@"
fi

become() {
    setpriv --reuid "$owner" --regid "$group" --clear-groups "$@"
}

# A container may show a checkout that belongs to a user who can't reach it there.
if ! become test -w "$checkout"; then
    exec "$@"
fi

home=$(getent passwd "$owner" | cut -d: -f6)
become env HOME="${home:-$checkout/build}" "$@"
