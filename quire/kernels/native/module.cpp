// The CPython face: addresses and sizes in, kernels out. Shapes and types were checked by ops.py;
// what only the values can tell (indices within bounds) is checked here.
#include <Python.h>

#include <cstdint>
#include <cstring>

#include "formats.h"
#include "kernels.h"
#include "pool.h"

namespace {

using namespace quire;

bool cpu_has_avx2() {
#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
    __builtin_cpu_init();  // this runs before main, perhaps before the compiler's own initialisation
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return false;
#endif
}

bool cpu_has_avx512() {
#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
    return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

// The usable kernels named so, or the best usable ones for a null name; null if there are none.
const Kernels* find_kernels(const char* name) {
    const Kernels* known[] = {cpu_has_avx512() ? avx512_kernels() : nullptr, cpu_has_avx2() ? avx2_kernels() : nullptr, portable_kernels()};
    for (const Kernels* kernels : known)
        if (kernels && (!name || !std::strcmp(name, kernels->name))) return kernels;
    return nullptr;
}

const Kernels* current = find_kernels(nullptr);

// Takes positional arguments one after the other; a wrong type is reported by done().
class Arguments {
  public:
    Arguments(PyObject* const* values, Py_ssize_t count) : values_(values), left_(count) {}
    operator Index() { return static_cast<Index>(number()); }
    long long number() {
        PyObject* value = next();
        return value ? PyLong_AsLongLong(value) : 0;
    }
    uint64_t unsigned_number() {
        PyObject* value = next();
        return value ? PyLong_AsUnsignedLongLong(value) : 0;
    }
    double real() {
        PyObject* value = next();
        return value ? PyFloat_AsDouble(value) : 0;
    }
    template <class T>
    operator T*() {
        return reinterpret_cast<T*>(static_cast<intptr_t>(number()));
    }
    bool done() {
        if (!PyErr_Occurred() && (left_ || short_)) PyErr_SetString(PyExc_TypeError, "wrong number of arguments");
        return !PyErr_Occurred();
    }

  private:
    PyObject* next() {
        if (!left_) short_ = true;
        return left_ ? (--left_, *values_++) : nullptr;
    }
    PyObject* const* values_;
    Py_ssize_t left_;
    bool short_ = false;
};

// Lets other Python threads run during work that outweighs the hand-over (about 30 us).
class Unlocked {
  public:
    explicit Unlocked(Index operations) : saved_(operations > 100000 ? PyEval_SaveThread() : nullptr) {}
    ~Unlocked() {
        if (saved_) PyEval_RestoreThread(saved_);
    }

  private:
    PyThreadState* saved_;
};

PyObject* fail(const char* message) {
    PyErr_SetString(PyExc_ValueError, message);
    return nullptr;
}

bool within(const int64_t* values, Index count, int64_t low, int64_t limit) {
    for (Index i = 0; i < count; ++i)
        if (values[i] < low || values[i] >= limit) return false;
    return true;
}

#define QUIRE_OP(name) PyObject* name(PyObject*, PyObject* const* values, Py_ssize_t count)

QUIRE_OP(op_linear) {
    Arguments in(values, count);
    LinearArgs a{in, in, in, in, in, in, in, in, in, in};
    if (!in.done()) return nullptr;
    if (a.rows && a.n) {
        Unlocked unlocked(a.rows * a.n * a.k);
        current->linear(a);
    }
    Py_RETURN_NONE;
}

QUIRE_OP(op_norm) {
    Arguments in(values, count);
    NormArgs a{in, in, in, in, in.real(), in, in, in};
    if (!in.done()) return nullptr;
    Unlocked unlocked(a.rows * a.width);
    current->norm(a);
    Py_RETURN_NONE;
}

const char* write_problem(const int64_t* positions, Index position_limit, const int64_t* slots, Index slot_limit, Index rows) {
    if (positions && !within(positions, rows, 0, position_limit)) return "positions: outside the rotary table";
    return within(slots, rows, INT64_MIN, slot_limit) ? nullptr : "slots: beyond the cache";
}

QUIRE_OP(op_rotary_cache) {
    Arguments in(values, count);
    RotaryArgs a{in, in, in, in, in, in, in, in.real(), in, in, in, in, in, in, in, in, in};
    const Index position_limit = in, slot_limit = in;
    if (!in.done()) return nullptr;
    const char* problem = write_problem(a.rotary_size ? a.positions : nullptr, position_limit, a.slots, slot_limit, a.rows);
    if (problem) return fail(problem);
    Unlocked unlocked(a.rows * a.query_heads * a.head_size);
    current->rotary_cache(a);
    Py_RETURN_NONE;
}

const char* attention_problem(const AttentionArgs& a, Index tokens, Index blocks) {
    if (a.query_start[0] != 0 || a.query_start[a.sequences] != tokens) return "query_start: must run from 0 to the number of query rows";
    for (Index i = 0; i < a.sequences; ++i) {
        const Index queries = a.query_start[i + 1] - a.query_start[i], context = a.context_len[i];
        if (queries < 0) return "query_start: must not decrease";
        if (!queries) continue;
        if (context < queries) return "context_len: smaller than the chunk it ends with";
        if (context > a.table_stride * kCacheBlock) return "block_tables: too narrow for context_len";
        const Index oldest = a.window && context - queries + 1 > a.window ? context - queries + 1 - a.window : 0;
        for (Index block = oldest / kCacheBlock; block * kCacheBlock < context; ++block) {
            const int32_t at = a.block_tables[i * a.table_stride + block];
            if (at < 0 || at >= blocks) return "block_tables: a visible entry is not a block of the cache";
        }
    }
    return nullptr;
}

Index keys_seen(const AttentionArgs& a) {
    Index seen = 0;
    for (Index i = 0; i < a.sequences; ++i) seen += (a.query_start[i + 1] - a.query_start[i]) * a.context_len[i];
    return seen;
}

QUIRE_OP(op_attention) {
    Arguments in(values, count);
    AttentionArgs a{in, in, in, in, in, in, in, in, in, in, in, in, in.real(), in, in.real(), in, in};
    const Index tokens = in, blocks = in;
    if (!in.done()) return nullptr;
    if (const char* problem = attention_problem(a, tokens, blocks)) return fail(problem);
    Unlocked unlocked(keys_seen(a) * a.query_heads * a.head_size);
    current->attention(a);
    Py_RETURN_NONE;
}

QUIRE_OP(op_latent_cache) {
    Arguments in(values, count);
    LatentCacheArgs a{in, in, in, in, in, in, in, in.real(), in, in, in, in, in, in, in, in, in};
    const Index position_limit = in, slot_limit = in;
    if (!in.done()) return nullptr;
    if (const char* problem = write_problem(a.positions, position_limit, a.slots, slot_limit, a.rows)) return fail(problem);
    Unlocked unlocked(a.rows * (a.rank + a.heads * a.rotary));
    current->latent_cache(a);
    Py_RETURN_NONE;
}

QUIRE_OP(op_latent_attention) {
    Arguments in(values, count);
    LatentAttentionArgs a{in, in, in, in, in, in, in, in, in, in, in, in.real(), in};
    const Index tokens = in, blocks = in;
    if (!in.done()) return nullptr;
    AttentionArgs paged{};
    paged.block_tables = a.block_tables, paged.table_stride = a.table_stride;
    paged.query_start = a.query_start, paged.context_len = a.context_len, paged.sequences = a.sequences;
    if (const char* problem = attention_problem(paged, tokens, blocks)) return fail(problem);
    Unlocked unlocked(keys_seen(paged) * a.heads * a.width);
    current->latent_attention(a);
    Py_RETURN_NONE;
}

QUIRE_OP(op_gated_activation) {
    Arguments in(values, count);
    GatedArgs a{in, in, in, in, in};
    if (!in.done()) return nullptr;
    Unlocked unlocked(a.rows * a.width * 2);
    current->gated_activation(a);
    Py_RETURN_NONE;
}

QUIRE_OP(op_argmax) {
    Arguments in(values, count);
    ReduceArgs a{in, in, in, in, in};
    if (!in.done()) return nullptr;
    Unlocked unlocked(a.rows * a.width / 2);
    current->argmax(a);
    Py_RETURN_NONE;
}

QUIRE_OP(op_logsumexp) {
    Arguments in(values, count);
    ReduceArgs a{in, in, in, in, in};
    if (!in.done()) return nullptr;
    Unlocked unlocked(a.rows * a.width);
    current->logsumexp(a);
    Py_RETURN_NONE;
}

QUIRE_OP(op_gumbel) {
    Arguments in(values, count);
    const uint64_t seed = in.unsigned_number();
    const Index choice = in, position = in, size = in;
    float* out = in;
    if (!in.done()) return nullptr;
    Unlocked unlocked(size * 16);
    current->gumbel(seed, uint32_t(choice), uint32_t(position), size, out);
    Py_RETURN_NONE;
}

QUIRE_OP(op_pack) {
    Arguments in(values, count);
    const Index format = in;
    const uint8_t* source = in;
    const Index row_bytes = in, n = in, k = in;
    uint8_t* packed = in;
    if (!in.done()) return nullptr;
    Unlocked unlocked(n * k);
    if (n) pack_rows(int(format), source, row_bytes, n, k, packed);
    Py_RETURN_NONE;
}

QUIRE_OP(op_unpack_rows) {
    Arguments in(values, count);
    const Index format = in;
    const uint8_t* packed = in;
    const Index n = in, k = in;
    const int64_t* ids = in;
    const Index rows = in;
    const double scale = in.real();
    float* out = in;
    if (!in.done()) return nullptr;
    if (!within(ids, rows, 0, n)) return fail("ids: outside the table");
    Unlocked unlocked(rows * k);
    unpack_rows(int(format), packed, k, ids, rows, float(scale), out);
    Py_RETURN_NONE;
}

QUIRE_OP(op_packed_nbytes) {
    Arguments in(values, count);
    const Index format = in, n = in, k = in;
    if (!in.done()) return nullptr;
    return PyLong_FromLongLong(ceil_div(n, kLanes) * panel_bytes(int(format), k));
}

PyObject* op_set_num_threads(PyObject*, PyObject* value) {
    const Index threads = PyLong_AsLong(value);
    if (PyErr_Occurred()) return nullptr;
    if (threads < 1 || threads > 1024) return fail("threads: must be 1 to 1024");
    Py_BEGIN_ALLOW_THREADS
    set_thread_count(int(threads));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject* op_num_threads(PyObject*, PyObject*) { return PyLong_FromLong(thread_count()); }
PyObject* op_isa(PyObject*, PyObject*) { return PyUnicode_FromString(current->name); }

PyObject* op_set_isa(PyObject*, PyObject* value) {
    const char* name = PyUnicode_AsUTF8AndSize(value, nullptr);
    if (!name) return nullptr;
    const Kernels* found = find_kernels(name);
    if (!found) return fail("isa: this processor or build does not have it");
    current = found;
    Py_RETURN_NONE;
}

#define QUIRE_FAST(name) {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(op_##name)), METH_FASTCALL, nullptr}
PyMethodDef methods[] = {
    QUIRE_FAST(linear), QUIRE_FAST(norm), QUIRE_FAST(rotary_cache), QUIRE_FAST(attention), QUIRE_FAST(latent_cache),
    QUIRE_FAST(latent_attention), QUIRE_FAST(gated_activation),
    QUIRE_FAST(argmax), QUIRE_FAST(logsumexp), QUIRE_FAST(gumbel), QUIRE_FAST(pack), QUIRE_FAST(unpack_rows), QUIRE_FAST(packed_nbytes),
    {"set_num_threads", op_set_num_threads, METH_O, nullptr},
    {"num_threads", op_num_threads, METH_NOARGS, nullptr},
    {"isa", op_isa, METH_NOARGS, nullptr},
    {"set_isa", op_set_isa, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "Kernels of quire for processors.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
    PyObject* module = PyModule_Create(&definition);
    if (!module) return nullptr;
    const char* names[kFormats] = {"f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k"};
    PyObject* formats = PyDict_New();
    for (Index i = 0; formats && i < kFormats; ++i) {
        PyObject* number = PyLong_FromLong(i);
        if (!number || PyDict_SetItemString(formats, names[i], number)) Py_CLEAR(formats);
        Py_XDECREF(number);
    }
    if (!formats || PyModule_AddObjectRef(module, "FORMATS", formats)) Py_CLEAR(module);
    Py_XDECREF(formats);
    return module;
}
