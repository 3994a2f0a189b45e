/* What pyfuse3 cannot ask the kernel for, and its requests one by one.
 *
 * pyfuse3 hides the connection it negotiates, and with POSIX ACLs on it leaves FUSE_CAP_DONT_MASK off: the kernel then takes
 * the umask off the mode before we see it, which a default access list must come before (umask(2)). So this module defines
 * fuse_session_new itself, hooks the init callback, and hands on to libfuse. It must be loaded with RTLD_GLOBAL before
 * pyfuse3 is, so that the linker finds this definition first; stratum/fuse/__init__.py does that.
 *
 * Knowing the session, it also receives a request without waiting and hands it to pyfuse3's handlers, for fuse/session.py; and it
 * answers by itself the question that the kernel asks before every write(2): whether the file has capabilities. None ever has.
 *
 * pyfuse3 cannot say either that the kernel may keep a directory's listing; here the handle's number says it.
 *
 * The requests that pyfuse3 has no handlers for are in fuse/extra_operations.c, those for locks in fuse/locks.c.
 *
 * And it keeps the kernel's first message, for a program that takes the connection over: see fuse/takeover.py.
 */

#define _GNU_SOURCE
#include "negotiate.h"
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

typedef struct fuse_session *session_new(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *);

static void (*init_of_caller)(void *, struct fuse_conn_info *);
static void (*getxattr_of_caller)(fuse_req_t, fuse_ino_t, const char *, size_t);
static unsigned int wanted;
static struct fuse_session *session;
static struct fuse_buf buffer;
static uint64_t taken_here;
static uint64_t *taken = &taken_here;
static char init_message[256];
static size_t init_bytes;

static void init(void *userdata, struct fuse_conn_info *connection)
{
    if (init_of_caller != NULL)
        init_of_caller(userdata, connection);
    if (connection->want & FUSE_CAP_POSIX_ACL)
        connection->want |= connection->capable & FUSE_CAP_DONT_MASK;
    choose_locks(connection);
    wanted = connection->want;
}

static void getxattr(fuse_req_t request, fuse_ino_t inode, const char *name, size_t bytes)
{
    if (strcmp(name, "security.capability") == 0)
        fuse_reply_err(request, ENODATA);
    else
        getxattr_of_caller(request, inode, name, bytes);
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
    getxattr_of_caller = hooked.getxattr;
    if (getxattr_of_caller != NULL)
        hooked.getxattr = getxattr;
    hook_extra_operations(&hooked);
    hook_locks(&hooked);
    session = next(arguments, &hooked, sizeof hooked, userdata);
    return session;
}

int session_descriptor(void)
{
    return session == NULL ? -1 : fuse_session_fd(session);
}

/* Bits of a handle, see OpenFiles. Of a directory's: the kernel may use and fill its listing; it need not drop the one it has.
 * Of a file's: its close need not ask for a flush (FOPEN_NOFLUSH), which was a request in four of open, read, close. */
#define USES_LISTING (UINT64_C(1) << 62)
#define DIRECTORY (UINT64_C(1) << 61)
#define CHANGES_NOTHING (UINT64_C(1) << 60)

__attribute__((visibility("default"))) int fuse_reply_open(fuse_req_t request, const struct fuse_file_info *opened)
{
    static int (*next)(fuse_req_t, const struct fuse_file_info *);
    struct fuse_file_info told = *opened;

    if (next == NULL)
        next = (int (*)(fuse_req_t, const struct fuse_file_info *))dlsym(RTLD_NEXT, "fuse_reply_open");
    if (told.fh & USES_LISTING)
        told.cache_readdir = 1;
    if (told.fh & DIRECTORY)
        told.keep_cache = 1;
    if (told.fh & CHANGES_NOTHING)
        told.noflush = 1;
    return next(request, &told);
}

static PyObject *begin(PyObject *module, PyObject *unused)
{
    int descriptor, flags;

    (void)module, (void)unused;
    if (session == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "there is no FUSE session yet");
        return NULL;
    }
    descriptor = fuse_session_fd(session);
    flags = fcntl(descriptor, F_GETFL);
    if (flags < 0 || fcntl(descriptor, F_SETFL, flags | O_NONBLOCK) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    return PyLong_FromLong(descriptor);
}

/* Every request begins with a header of 40 bytes (linux/fuse.h): its length and its kind, 32 bits each, then its number in 64 bits; at
 * PROCESS stands whose it is. An interrupt has the number of the request that it is about behind the header. */
enum { FORGET = 2, INIT = 26, INTERRUPT = 36, BATCH_FORGET = 42 };
enum { HEADER_BYTES = 40, NUMBER = 8, PROCESS = 32 };
enum { ENDED = -1, NONE = 0, TAKEN = 1, INTERRUPTS = 2 };

static uint32_t kind_of(const char *message, size_t bytes)
{
    uint32_t kind = 0;

    if (bytes >= HEADER_BYTES)
        memcpy(&kind, message + 4, sizeof kind);
    return kind;
}

/* Of what was received last. A large write is left in a pipe, of which nothing is known here. */
static uint32_t kind_received(void)
{
    return buffer.flags & FUSE_BUF_IS_FD ? 0 : kind_of(buffer.mem, buffer.size);
}

static uint64_t number_at(size_t offset)
{
    uint64_t number = 0;

    if (!(buffer.flags & FUSE_BUF_IS_FD) && buffer.mem != NULL && buffer.size >= offset + sizeof number)
        memcpy(&number, (const char *)buffer.mem + offset, sizeof number);
    return number;
}

static PyObject *request(PyObject *module, PyObject *unused)
{
    uint64_t number = number_at(NUMBER);

    (void)module, (void)unused;
    return Py_BuildValue("KI", (unsigned long long)number, (unsigned int)(uint32_t)number_at(PROCESS));
}

static PyObject *interrupted(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyLong_FromUnsignedLongLong(number_at(HEADER_BYTES));
}

static void keep_init(const char *message, size_t bytes)
{
    if (kind_of(message, bytes) != INIT || bytes > sizeof init_message)
        return;
    memcpy(init_message, message, bytes);
    init_bytes = bytes;
}

static PyObject *negotiated(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return Py_BuildValue("y#I", init_message, (Py_ssize_t)init_bytes, wanted);
}

static PyObject *replay(PyObject *module, PyObject *message)
{
    struct fuse_buf told = {0};
    char *bytes;
    Py_ssize_t size;

    (void)module;
    if (PyBytes_AsStringAndSize(message, &bytes, &size) < 0)
        return NULL;
    keep_init(bytes, size);
    if (init_bytes != (size_t)size) {
        PyErr_SetString(PyExc_ValueError, "this is not the first message of a kernel");
        return NULL;
    }
    told.mem = init_message;
    told.size = init_bytes;
    fuse_session_process_buf(session, &told);
    Py_RETURN_NONE;
}

/* The interpreter is kept: receiving never sleeps, and the handlers that libfuse calls want it at once. */
static PyObject *step(PyObject *module, PyObject *unused)
{
    int received;
    uint32_t kind;

    (void)module, (void)unused;
    if (fuse_session_exited(session))
        return PyLong_FromLong(ENDED);
    received = fuse_session_receive_buf(session, &buffer);
    if (received == -EAGAIN || received == -EINTR)
        return PyLong_FromLong(NONE);
    if (received == 0)
        return PyLong_FromLong(ENDED);
    if (received < 0) {
        errno = -received;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    if (init_bytes == 0)
        keep_init(buffer.mem, received);
    kind = kind_received();
    /* Before its handler reads anything, in the order that all processors see: stratum/stillness.py stands on it. */
    if (kind != FORGET && kind != BATCH_FORGET && kind != INTERRUPT)
        __atomic_add_fetch(taken, 1, __ATOMIC_SEQ_CST);
    translate(buffer.flags & FUSE_BUF_IS_FD ? NULL : buffer.mem, received);
    fuse_session_process_buf(session, &buffer);
    return PyLong_FromLong(kind == INTERRUPT ? INTERRUPTS : TAKEN);
}

static PyObject *count_in(PyObject *module, PyObject *word)
{
    static Py_buffer counted;
    Py_buffer given;

    (void)module;
    if (word == Py_None) {
        taken_here = __atomic_load_n(taken, __ATOMIC_SEQ_CST);
        taken = &taken_here;
        if (counted.obj != NULL)
            PyBuffer_Release(&counted);
        Py_RETURN_NONE;
    }
    if (PyObject_GetBuffer(word, &given, PyBUF_WRITABLE) < 0)
        return NULL;
    if (counted.obj != NULL || given.len != sizeof *taken || (uintptr_t)given.buf % sizeof *taken != 0) {
        PyBuffer_Release(&given);
        PyErr_SetString(PyExc_ValueError, "this is no word to count in, or there is one already");
        return NULL;
    }
    counted = given;
    taken = counted.buf;
    Py_RETURN_NONE;
}

static PyObject *requests_taken(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyLong_FromUnsignedLongLong(__atomic_load_n(taken, __ATOMIC_SEQ_CST));
}

static PyObject *spin(PyObject *module, PyObject *microseconds)
{
    struct pollfd polled = {.fd = fuse_session_fd(session), .events = POLLIN};
    struct timespec began, now;
    long limit = PyLong_AsLong(microseconds), passed;
    int ready;

    (void)module;
    if (limit == -1 && PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    clock_gettime(CLOCK_MONOTONIC, &began);
    do {
        ready = poll(&polled, 1, 0);
        clock_gettime(CLOCK_MONOTONIC, &now);
        passed = (now.tv_sec - began.tv_sec) * 1000000 + (now.tv_nsec - began.tv_nsec) / 1000;
    } while (ready == 0 && passed < limit);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(ready > 0);
}

static PyObject *keeps_umask_out(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyBool_FromLong(fuse_version() >= 30 && (wanted & FUSE_CAP_DONT_MASK) != 0);
}

static PyObject *wait_for(PyObject *module, PyObject *arguments)
{
    struct pollfd polled[2] = {{.events = POLLIN}, {.fd = fuse_session_fd(session), .events = POLLIN}};
    struct timespec limit = {0, 0};
    long microseconds;

    (void)module;
    if (!PyArg_ParseTuple(arguments, "il", &polled[0].fd, &microseconds))
        return NULL;
    limit.tv_sec = microseconds / 1000000;
    limit.tv_nsec = microseconds % 1000000 * 1000;
    Py_BEGIN_ALLOW_THREADS
    ppoll(polled, 2, &limit, NULL);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* Over `session` for whoever tells the kernel something from a thread of its own: pyfuse3 may be closing it. */
static pthread_mutex_t telling = PTHREAD_MUTEX_INITIALIZER;

__attribute__((visibility("default"))) void fuse_session_destroy(struct fuse_session *destroyed)
{
    void (*next)(struct fuse_session *) = (void (*)(struct fuse_session *))dlsym(RTLD_NEXT, "fuse_session_destroy");

    pthread_mutex_lock(&telling);
    if (session == destroyed)
        session = NULL;
    pthread_mutex_unlock(&telling);
    next(destroyed);
}

struct forgotten {
    unsigned long long directory;
    const char *name;
    Py_ssize_t bytes;
    unsigned long long inode;
    int deleted;
};

/* Of an inode that has no name left the kernel tells whoever watches it (IN_DELETE_SELF). That needs the lock of the inode besides its
 * directory's, which is held while a write, a sync or a change of attributes waits for us: as little in our way as that one. */
static int forget_name(const struct forgotten *one)
{
    if (one->deleted && fuse_lowlevel_notify_delete(session, one->directory, one->inode, one->name, one->bytes) == 0)
        return 0;
    return fuse_lowlevel_notify_inval_entry(session, one->directory, one->name, one->bytes);
}

static int tell_kernel(const struct forgotten *one)
{
    int error = 0, another = 0;

    if (one->directory != 0) {
        if (one->bytes > 0)
            error = forget_name(one);
        /* After the name: that waits for the directory's lock, so whoever was reading it has put into the cache what it read. */
        another = fuse_lowlevel_notify_inval_inode(session, one->directory, 0, 0);
        error = error && error != -ENOENT ? error : another;
    }
    if (one->inode != 0) {
        another = fuse_lowlevel_notify_inval_inode(session, one->inode, 0, 0);
        error = error && error != -ENOENT ? error : another;
    }
    return error == -ENOENT ? 0 : error;
}

/* Whoever waits is answered before this thread takes the interpreter again: what the kernel forgets it tells the loop, which takes it first. */
static PyObject *forget(PyObject *module, PyObject *arguments)
{
    enum { AT_ONCE_MAX = 64, ANSWERS_MAX = 64 };
    struct forgotten rows[AT_ONCE_MAX];
    int descriptors[ANSWERS_MAX], error = 0;
    PyObject *list, *answers;
    Py_buffer word;
    unsigned long long applied;
    uint64_t answer;
    Py_ssize_t row, count, waiting;

    (void)module;
    if (!PyArg_ParseTuple(arguments, "O!w*KO!", &PyList_Type, &list, &word, &applied, &PyList_Type, &answers))
        return NULL;
    count = PyList_GET_SIZE(list);
    waiting = PyList_GET_SIZE(answers);
    answer = applied;
    if (count > AT_ONCE_MAX || waiting > ANSWERS_MAX || word.len != sizeof answer) {
        PyBuffer_Release(&word);
        PyErr_SetString(PyExc_ValueError, "more than is forgotten at once, or no word");
        return NULL;
    }
    for (row = 0; row < count; row++)
        if (!PyArg_ParseTuple(PyList_GET_ITEM(list, row), "Ky#Kp", &rows[row].directory, &rows[row].name, &rows[row].bytes, &rows[row].inode, &rows[row].deleted)) {
            PyBuffer_Release(&word);
            return NULL;
        }
    for (row = 0; row < waiting; row++)
        descriptors[row] = PyLong_AsLong(PyList_GET_ITEM(answers, row));
    if (PyErr_Occurred()) {
        PyBuffer_Release(&word);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&telling);
    for (row = 0; row < count && session != NULL && error == 0; row++)
        error = tell_kernel(&rows[row]);
    pthread_mutex_unlock(&telling);
    if (error == 0) {
        __atomic_store_n((uint64_t *)word.buf, answer, __ATOMIC_RELEASE);
        for (row = 0; row < waiting; row++)
            send(descriptors[row], &answer, sizeof answer, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&word);
    if (error != 0) {
        errno = -error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"keeps_umask_out", keeps_umask_out, METH_NOARGS, "Whether the kernel leaves the umask of the last session to us."},
    {"begin", begin, METH_NOARGS, "Let no read of the session's descriptor wait; the descriptor."},
    {"step", step, METH_NOARGS, "Receive a request and call its handler: 1; 2 if it interrupts another one, 0 if there is none, -1 at the end of the session."},
    {"request", request, METH_NOARGS, "The number of the request that was received last, and the process that waits for it; 0 if that is not known."},
    {"interrupted", interrupted, METH_NOARGS, "The number of the request that the interrupt which was received last is about."},
    {"negotiated", negotiated, METH_NOARGS, "The kernel's first message and what was wanted of it, as bits."},
    {"replay", replay, METH_O, "Handle a first message that another program has answered already."},
    {"forget", forget, METH_VARARGS, "Make the kernel forget names and inodes; then write a word, and send it to descriptors."},
    {"count_in", count_in, METH_O, "Count in this word from now on; None: in one of our own."},
    {"taken", requests_taken, METH_NOARGS, "How many requests were taken whose answers may teach the kernel something."},
    {"spin", spin, METH_O, "Look for a request for so many microseconds; whether there is one."},
    {"wait", wait_for, METH_VARARGS, "Wait for a descriptor or a request, for so many microseconds."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_negotiate", .m_doc = "What pyfuse3 cannot ask the kernel for.", .m_size = -1, .m_methods = functions,
};

/* What is written comes in requests of a mebibyte, and is given back soon. glibc would give each one's pages back to the kernel, to get
 * new ones that it has to clear: a third of the time of a large write. */
enum { KEPT_BYTES = 64 << 20, MAPPED_BYTES_MIN = 32 << 20 };

PyMODINIT_FUNC PyInit__negotiate(void)
{
    PyObject *module;

    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES);
    mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES_MIN);
    module = PyModule_Create(&definition);
    if (module != NULL && (PyModule_AddFunctions(module, extra_functions) < 0 || PyModule_AddFunctions(module, lock_functions) < 0))
        Py_CLEAR(module);
    return module;
}
