/* The requests of the kernel that pyfuse3 has no handlers for: fallocate, lseek, copy_file_range, O_TMPFILE.
 *
 * Each is handed to one Python function (`carry`) by name, with a capsule that stands for the request and is used up by its answer.
 * That function makes the coroutine of the handler, which runs as pyfuse3's own do: see fuse/session.py and fuse/extra_operations.py.
 *
 * Two requests are younger than libfuse, which would refuse them: FUSE_TMPFILE and FUSE_COPY_FILE_RANGE_64. Their messages are those of
 * FUSE_CREATE and FUSE_COPY_FILE_RANGE with another number; so libfuse is given that number, and here stands what it was.
 */

#include "negotiate.h"
#include <errno.h>
#include <string.h>

static PyObject *carrier;
static void (*create_of_caller)(fuse_req_t, fuse_ino_t, const char *, mode_t, struct fuse_file_info *);
static uint32_t kind_before;

enum { CREATE = 35, COPY_FILE_RANGE = 47, TMPFILE = 51, COPY_FILE_RANGE_64 = 53 };

/* NULL: of a message that lies in a pipe, as a large write does. */
void translate(char *message, size_t bytes)
{
    uint32_t kind = 0;

    kind_before = 0;
    if (message == NULL || bytes < 8)
        return;
    memcpy(&kind, message + 4, sizeof kind);
    if (kind != TMPFILE && kind != COPY_FILE_RANGE_64)
        return;
    kind_before = kind;
    kind = kind == TMPFILE ? CREATE : COPY_FILE_RANGE;
    memcpy(message + 4, &kind, sizeof kind);
}

static const char CAPSULE[] = "fuse_req_t";

/* Takes over `arguments`. Whatever goes wrong before there is a handler is the kernel's EIO. */
void hand_over(fuse_req_t request, const char *name, PyObject *arguments)
{
    PyObject *capsule = NULL, *done = NULL;

    if (arguments != NULL && carrier != NULL)
        capsule = PyCapsule_New(request, CAPSULE, NULL);
    if (capsule != NULL)
        done = PyObject_CallFunction(carrier, "sOO", name, capsule, arguments);
    if (done == NULL) {
        if (PyErr_Occurred())
            PyErr_WriteUnraisable(carrier);
        if (capsule == NULL || PyCapsule_IsValid(capsule, CAPSULE)) {
            if (capsule != NULL)
                PyCapsule_SetName(capsule, "answered");
            fuse_reply_err(request, carrier == NULL ? ENOSYS : EIO);
        }
    }
    Py_XDECREF(done);
    Py_XDECREF(capsule);
    Py_XDECREF(arguments);
}

static void fallocate_request(fuse_req_t request, fuse_ino_t inode, int mode, off_t offset, off_t length, struct fuse_file_info *opened)
{
    PyGILState_STATE state = PyGILState_Ensure();

    (void)inode;
    hand_over(request, "fallocate",
              Py_BuildValue("KiLL", (unsigned long long)opened->fh, mode, (long long)offset, (long long)length));
    PyGILState_Release(state);
}

static void lseek_request(fuse_req_t request, fuse_ino_t inode, off_t offset, int whence, struct fuse_file_info *opened)
{
    PyGILState_STATE state = PyGILState_Ensure();

    (void)inode;
    hand_over(request, "lseek", Py_BuildValue("KLi", (unsigned long long)opened->fh, (long long)offset, whence));
    PyGILState_Release(state);
}

static void copy_request(fuse_req_t request, fuse_ino_t inode, off_t offset, struct fuse_file_info *opened, fuse_ino_t inode_to,
                         off_t offset_to, struct fuse_file_info *opened_to, size_t bytes, int flags)
{
    PyGILState_STATE state = PyGILState_Ensure();

    (void)inode, (void)inode_to, (void)flags;
    hand_over(request, "copy_file_range",
              Py_BuildValue("iKLKLK", kind_before == COPY_FILE_RANGE_64, (unsigned long long)opened->fh, (long long)offset,
                            (unsigned long long)opened_to->fh, (long long)offset_to, (unsigned long long)bytes));
    PyGILState_Release(state);
}

static void create_request(fuse_req_t request, fuse_ino_t directory, const char *name, mode_t mode, struct fuse_file_info *opened)
{
    const struct fuse_ctx *caller = fuse_req_ctx(request);
    PyGILState_STATE state;

    if (kind_before != TMPFILE) {
        create_of_caller(request, directory, name, mode, opened);
        return;
    }
    state = PyGILState_Ensure();
    hand_over(request, "tmpfile",
              Py_BuildValue("KIi(IIII)", (unsigned long long)directory, (unsigned)mode, opened->flags, (unsigned)caller->uid,
                            (unsigned)caller->gid, (unsigned)caller->pid, (unsigned)caller->umask));
    PyGILState_Release(state);
}

void hook_extra_operations(struct fuse_lowlevel_ops *hooked)
{
    hooked->fallocate = fallocate_request;
    hooked->lseek = lseek_request;
    hooked->copy_file_range = copy_request;
    create_of_caller = hooked->create;
    hooked->create = create_request;
}

static PyObject *carry(PyObject *module, PyObject *function)
{
    PyObject *before = carrier;

    (void)module;
    carrier = function == Py_None ? NULL : Py_NewRef(function);
    Py_XDECREF(before);
    Py_RETURN_NONE;
}

/* The request of a capsule, which can be asked for once. */
fuse_req_t used_up(PyObject *capsule)
{
    fuse_req_t request = PyCapsule_GetPointer(capsule, CAPSULE);

    if (request != NULL && PyCapsule_SetName(capsule, "answered") < 0)
        return NULL;
    return request;
}

static PyObject *refuse(PyObject *module, PyObject *arguments)
{
    PyObject *capsule;
    fuse_req_t request;
    int code;

    (void)module;
    if (!PyArg_ParseTuple(arguments, "Oi", &capsule, &code) || (request = used_up(capsule)) == NULL)
        return NULL;
    fuse_reply_err(request, code);
    Py_RETURN_NONE;
}

static PyObject *answer_offset(PyObject *module, PyObject *arguments)
{
    PyObject *capsule;
    fuse_req_t request;
    long long offset;

    (void)module;
    if (!PyArg_ParseTuple(arguments, "OL", &capsule, &offset) || (request = used_up(capsule)) == NULL)
        return NULL;
    fuse_reply_lseek(request, offset);
    Py_RETURN_NONE;
}

static PyObject *answer_copied(PyObject *module, PyObject *arguments)
{
    PyObject *capsule;
    fuse_req_t request;
    unsigned long long bytes;
    uint64_t copied;
    int wide;

    (void)module;
    if (!PyArg_ParseTuple(arguments, "OKp", &capsule, &bytes, &wide) || (request = used_up(capsule)) == NULL)
        return NULL;
    copied = bytes;
    if (wide)
        fuse_reply_buf(request, (const char *)&copied, sizeof copied);
    else
        fuse_reply_write(request, bytes);
    Py_RETURN_NONE;
}

static void split_ns(long long time_ns, struct timespec *time)
{
    const long long second = 1000000000;

    time->tv_nsec = (time_ns % second + second) % second;
    time->tv_sec = (time_ns - time->tv_nsec) / second;
}

static PyObject *answer_created(PyObject *module, PyObject *arguments)
{
    struct fuse_entry_param entry = {0};
    struct fuse_file_info opened = {0};
    unsigned long long handle, inode, size, blocks, device;
    long long atime_ns, mtime_ns, ctime_ns;
    unsigned int mode, links, uid, gid, block_bytes;
    PyObject *capsule;
    fuse_req_t request;

    (void)module;
    if (!PyArg_ParseTuple(arguments, "OK(KdIIIIKKIKLLL)", &capsule, &handle, &inode, &entry.attr_timeout, &mode, &links, &uid, &gid,
                          &device, &size, &block_bytes, &blocks, &atime_ns, &mtime_ns, &ctime_ns))
        return NULL;
    entry.ino = entry.attr.st_ino = inode;
    entry.attr.st_mode = mode;
    entry.attr.st_nlink = links;
    entry.attr.st_uid = uid;
    entry.attr.st_gid = gid;
    entry.attr.st_rdev = device;
    entry.attr.st_size = size;
    entry.attr.st_blksize = block_bytes;
    entry.attr.st_blocks = blocks;
    split_ns(atime_ns, &entry.attr.st_atim);
    split_ns(mtime_ns, &entry.attr.st_mtim);
    split_ns(ctime_ns, &entry.attr.st_ctim);
    opened.fh = handle;
    opened.keep_cache = 1;
    if ((request = used_up(capsule)) == NULL)
        return NULL;
    return PyBool_FromLong(fuse_reply_create(request, &entry, &opened) == 0);
}

PyMethodDef extra_functions[] = {
    {"carry", carry, METH_O, "Call this with each request that pyfuse3 has no handler for: name, request, arguments."},
    {"refuse", refuse, METH_VARARGS, "Answer a request with an errno; 0: it is done."},
    {"answer_offset", answer_offset, METH_VARARGS, "Answer lseek."},
    {"answer_copied", answer_copied, METH_VARARGS, "Answer copy_file_range: how many bytes, and whether they are told in 64 bits."},
    {"answer_created", answer_created, METH_VARARGS, "Answer a file that was made and opened; False if the kernel gave up waiting."},
    {NULL, NULL, 0, NULL},
};
