/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The capture spine for BCC: processes, system calls, messages and off-CPU time. See kernel.h. */
#include "state.h"
#include "processes.h"
