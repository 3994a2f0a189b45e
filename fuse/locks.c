/* Locks that mounts share: getlk, setlk, flock. The kernel sends them only if `share_locks` was called before the session began.
 *
 * A request for a lock that is not free is not answered at once, perhaps not by this program: libfuse is told to forget it (`leave`), and who has
 * its number answers it later (`answer_lock`), also after the connection was passed on.
 */

#include "negotiate.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

static int shares;
static uint64_t closing_owner;
static void (*flush_of_caller)(fuse_req_t, fuse_ino_t, struct fuse_file_info *);

void choose_locks(struct fuse_conn_info *connection)
{
    if (!shares)
        connection->want &= ~(FUSE_CAP_POSIX_LOCKS | FUSE_CAP_FLOCK_LOCKS);
}

static void ask_lock(fuse_req_t request, const char *name, const struct fuse_file_info *opened, const struct flock *lock, unsigned int pid,
                     int sleeps)
{
    const unsigned long long end = INT64_MAX;
    PyGILState_STATE state = PyGILState_Ensure();

    hand_over(request, name,
              Py_BuildValue("KKiKKIi", (unsigned long long)opened->fh, (unsigned long long)opened->lock_owner,
                            (int)lock->l_type, (unsigned long long)lock->l_start,
                            lock->l_len == 0 ? end : (unsigned long long)(lock->l_start + lock->l_len - 1), pid, sleeps));
    PyGILState_Release(state);
}

static void getlk_request(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *opened, struct flock *lock)
{
    (void)inode;
    ask_lock(request, "getlk", opened, lock, lock->l_pid, 0);
}

static void setlk_request(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *opened, struct flock *lock, int sleeps)
{
    (void)inode;
    ask_lock(request, "setlk", opened, lock, lock->l_pid, sleeps);
}

static void flock_request(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *opened, int operation)
{
    struct flock lock = {.l_type = F_UNLCK};

    (void)inode;
    if (operation & LOCK_SH)
        lock.l_type = F_RDLCK;
    else if (operation & LOCK_EX)
        lock.l_type = F_WRLCK;
    ask_lock(request, "flock", opened, &lock, fuse_req_ctx(request)->pid, !(operation & LOCK_NB));
}

static void flush_request(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *opened)
{
    closing_owner = opened->lock_owner;
    flush_of_caller(request, inode, opened);
}

void hook_locks(struct fuse_lowlevel_ops *hooked)
{
    hooked->getlk = getlk_request;
    hooked->setlk = setlk_request;
    hooked->flock = flock_request;
    flush_of_caller = hooked->flush;
    hooked->flush = flush_request;
}

static PyObject *share_locks(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    shares = 1;
    Py_RETURN_NONE;
}

static PyObject *owner_of_flush(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyLong_FromUnsignedLongLong(closing_owner);
}

static PyObject *leave(PyObject *module, PyObject *capsule)
{
    fuse_req_t request = used_up(capsule);

    (void)module;
    if (request == NULL)
        return NULL;
    fuse_reply_none(request);
    Py_RETURN_NONE;
}

static PyObject *answer_obstacle(PyObject *module, PyObject *arguments)
{
    struct flock lock = {.l_whence = SEEK_SET};
    unsigned long long start, last;
    PyObject *capsule;
    fuse_req_t request;
    int type, pid;

    (void)module;
    if (!PyArg_ParseTuple(arguments, "OiKKi", &capsule, &type, &start, &last, &pid) || (request = used_up(capsule)) == NULL)
        return NULL;
    lock.l_type = type;
    lock.l_start = start;
    lock.l_len = last >= INT64_MAX ? 0 : (off_t)(last - start + 1);
    lock.l_pid = pid;
    fuse_reply_lock(request, &lock);
    Py_RETURN_NONE;
}

static PyObject *answer_lock(PyObject *module, PyObject *arguments)
{
    struct {
        uint32_t bytes;
        int32_t error;
        uint64_t number;
    } header = {.bytes = sizeof header};
    unsigned long long answered;
    int code;

    (void)module;
    if (!PyArg_ParseTuple(arguments, "Ki", &answered, &code))
        return NULL;
    header.error = -code;
    header.number = answered;
    if (write(session_descriptor(), &header, sizeof header) < 0 && errno != ENOENT && errno != ENODEV)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

PyMethodDef lock_functions[] = {
    {"share_locks", share_locks, METH_NOARGS, "Have the next session ask us for locks."},
    {"owner_of_flush", owner_of_flush, METH_NOARGS, "Whose descriptor the flush that was received last closes."},
    {"leave", leave, METH_O, "Answer a request later, by its number."},
    {"answer_obstacle", answer_obstacle, METH_VARARGS, "Answer getlk: type, first and last byte and process of a lock."},
    {"answer_lock", answer_lock, METH_VARARGS, "Answer a request that was left, by its number, with an errno; 0: it has its lock."},
    {NULL, NULL, 0, NULL},
};
