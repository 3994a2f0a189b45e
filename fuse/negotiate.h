/* Between the files of the extension module _negotiate. */

#ifndef STRATUM_NEGOTIATE_H
#define STRATUM_NEGOTIATE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <fuse_lowlevel.h>
#include <stdint.h>

#define HIDDEN __attribute__((visibility("hidden")))

/* extra_operations.c */
HIDDEN void hook_extra_operations(struct fuse_lowlevel_ops *hooked);
HIDDEN void translate(char *message, size_t bytes);
HIDDEN extern PyMethodDef extra_functions[];

#endif
