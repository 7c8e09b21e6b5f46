// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The capture spine once more, over perf ring buffers and for kernels from 5.10 on. What these lack, and what
 * is done instead, stands where PERF_TRANSPORT and OLD_KERNELS are asked for.
 */
#define PERF_TRANSPORT
#define OLD_KERNELS

#include "capture.bpf.c"
