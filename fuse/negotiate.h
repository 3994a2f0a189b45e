/* Between the files of the extension module _negotiate. */

#ifndef STRATUM_NEGOTIATE_H
#define STRATUM_NEGOTIATE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <fuse_lowlevel.h>
#include <stdint.h>

#define HIDDEN __attribute__((visibility("hidden")))

/* negotiate.c */
HIDDEN int session_descriptor(void);

/* extra_operations.c */
HIDDEN void hook_extra_operations(struct fuse_lowlevel_ops *hooked);
HIDDEN void translate(char *message, size_t bytes);
HIDDEN void hand_over(fuse_req_t request, const char *name, PyObject *arguments);
HIDDEN fuse_req_t used_up(PyObject *capsule);
HIDDEN extern PyMethodDef extra_functions[];

/* locks.c */
HIDDEN void hook_locks(struct fuse_lowlevel_ops *hooked);
HIDDEN void choose_locks(struct fuse_conn_info *connection);
HIDDEN extern PyMethodDef lock_functions[];

#endif
