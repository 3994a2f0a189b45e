/* What pyfuse3 cannot ask the kernel for.
 *
 * pyfuse3 hides the connection it negotiates, and with POSIX ACLs on it leaves FUSE_CAP_DONT_MASK off: the kernel then takes
 * the umask off the mode before we see it, which a default access list must come before (umask(2)). So this module defines
 * fuse_session_new itself, hooks the init callback, and hands on to libfuse. It must be loaded with RTLD_GLOBAL before
 * pyfuse3 is, so that the linker finds this definition first; stratum/fuse/__init__.py does that.
 */

#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <fuse_lowlevel.h>
#include <string.h>

typedef struct fuse_session *session_new(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *);

static void (*init_of_caller)(void *, struct fuse_conn_info *);
static unsigned int wanted;

static void init(void *userdata, struct fuse_conn_info *connection)
{
    if (init_of_caller != NULL)
        init_of_caller(userdata, connection);
    if (connection->want & FUSE_CAP_POSIX_ACL)
        connection->want |= connection->capable & FUSE_CAP_DONT_MASK;
    wanted = connection->want;
}

__attribute__((visibility("default"))) struct fuse_session *
fuse_session_new(struct fuse_args *arguments, const struct fuse_lowlevel_ops *operations, size_t bytes, void *userdata)
{
    struct fuse_lowlevel_ops hooked;
    session_new *next = (session_new *)dlsym(RTLD_NEXT, "fuse_session_new");

    if (next == NULL || bytes > sizeof hooked)
        return NULL;
    memset(&hooked, 0, sizeof hooked);
    memcpy(&hooked, operations, bytes);
    init_of_caller = hooked.init;
    hooked.init = init;
    return next(arguments, &hooked, bytes, userdata);
}

static PyObject *keeps_umask_out(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyBool_FromLong(fuse_version() >= 30 && (wanted & FUSE_CAP_DONT_MASK) != 0);
}

static PyMethodDef functions[] = {
    {"keeps_umask_out", keeps_umask_out, METH_NOARGS, "Whether the kernel leaves the umask of the last session to us."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_negotiate", .m_doc = "What pyfuse3 cannot ask the kernel for.", .m_size = -1, .m_methods = functions,
};

PyMODINIT_FUNC PyInit__negotiate(void)
{
    return PyModule_Create(&definition);
}
