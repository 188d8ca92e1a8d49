// quamba._cpu: the kernels as functions of plain integers and packed structs. No torch: Python passes data pointers.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <cstddef>
#include <cstring>
#include <exception>

#include "quamba/cpu/params.h"

namespace {

using namespace quamba::cpu;

const Kernels* best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma"))
    return &kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kAvx2;
#endif
  return &kGeneric;
}

const Kernels* kernels = best();

// Runs `call` without the interpreter's lock; a C++ exception becomes a Python one.
template <class Call>
PyObject* run(const Call& call) {
  std::array<char, 256> error{};
  PyThreadState* thread = PyEval_SaveThread();
  try {
    call();
  } catch (const std::exception& exception) {
    std::strncpy(error.data(), exception.what(), error.size() - 1);
    if (error[0] == 0) error[0] = '?';
  }
  PyEval_RestoreThread(thread);
  if (error[0] != 0) return PyErr_Format(PyExc_RuntimeError, "quamba._cpu: %s", error.data());
  Py_RETURN_NONE;
}

// The struct that an op's packed bytes hold.
template <class Params>
bool read(PyObject* bytes, Params* params) {
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (PyBytes_AsStringAndSize(bytes, &data, &size) < 0) return false;
  if (size != sizeof(Params)) {
    PyErr_Format(PyExc_ValueError, "found %zd bytes of parameters; expected %zd", size, sizeof(Params));
    return false;
  }
  std::memcpy(params, data, sizeof(Params));
  return true;
}

bool count_is(Py_ssize_t found, Py_ssize_t expected) {
  if (found != expected) PyErr_Format(PyExc_TypeError, "found %zd arguments; expected %zd", found, expected);
  return found == expected;
}

// mixer_step(params, hidden, out, conv_state, ssm_state, batch, threads): pointers as integers.
PyObject* mixer_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  MixerStep params;
  if (!count_is(count, 7) || !read(args[0], &params)) return nullptr;
  const Step step = {
      static_cast<const float*>(PyLong_AsVoidPtr(args[1])),
      static_cast<float*>(PyLong_AsVoidPtr(args[2])),
      static_cast<int8_t*>(PyLong_AsVoidPtr(args[3])),
      static_cast<float*>(PyLong_AsVoidPtr(args[4])),
      PyLong_AsLongLong(args[5]),
      PyLong_AsLongLong(args[6]),
  };
  if (PyErr_Occurred()) return nullptr;
  return run([&] { kernels->mixer_step(params, step); });
}

template <class Params, void (*Kernels::*kKernel)(const Params&)>
PyObject* packed(PyObject*, PyObject* bytes) {
  Params params;
  if (!read(bytes, &params)) return nullptr;
  return run([&] { (kernels->*kKernel)(params); });
}

// Names and kinds of a struct's members: P pointer, S scale (pointer and step), I integer, R float64.
#define NAMED_P(type, name) {#name, "P"},
#define NAMED_S(name) {#name, "S"},
#define NAMED_I(name) {#name, "I"},
#define NAMED_R(name) {#name, "R"},
struct Member {
  const char *name, *kind;
};
constexpr Member kMixerStep[] = {QUAMBA_MIXER_STEP(NAMED_P, NAMED_S, NAMED_I, NAMED_R)};
constexpr Member kSelectiveScan[] = {QUAMBA_SELECTIVE_SCAN(NAMED_P, NAMED_S, NAMED_I, NAMED_R)};
constexpr Member kCausalConv1d[] = {QUAMBA_CAUSAL_CONV1D(NAMED_P, NAMED_S, NAMED_I, NAMED_R)};
constexpr Member kLinear[] = {QUAMBA_LINEAR(NAMED_P, NAMED_S, NAMED_I, NAMED_R)};
constexpr Member kRmsNormQuant[] = {QUAMBA_RMS_NORM_QUANT(NAMED_P, NAMED_S, NAMED_I, NAMED_R)};
constexpr Member kHadamardQuant[] = {QUAMBA_HADAMARD_QUANT(NAMED_P, NAMED_S, NAMED_I, NAMED_R)};

template <size_t kCount>
bool add_members(PyObject* ops, const char* name, const Member (&members)[kCount]) {
  PyObject* list = PyTuple_New(kCount);
  for (size_t i = 0; list != nullptr && i < kCount; ++i) {
    PyObject* member = Py_BuildValue("(ss)", members[i].name, members[i].kind);
    if (member == nullptr || PyTuple_SetItem(list, static_cast<Py_ssize_t>(i), member) < 0) Py_CLEAR(list);
  }
  const bool added = list != nullptr && PyDict_SetItemString(ops, name, list) == 0;
  Py_XDECREF(list);
  return added;
}

// unchanged(values, expected, pointers, versions): whether every value is the expected one. A tensor, known by its
// pointer, has to be the same object with the same data pointer and version; others have None there and are compared.
PyObject* unchanged(PyObject*, PyObject* const* args, Py_ssize_t count) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  static PyObject* const version = PyUnicode_InternFromString("_version");
  if (!count_is(count, 4)) return nullptr;
  const Py_ssize_t size = PyTuple_Size(args[0]);
  for (int i = 0; i < 4; ++i)
    if (size < 0 || PyTuple_Size(args[i]) != size) {
      if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "expected tuples of one length");
      return nullptr;
    }
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject *value = PyTuple_GetItem(args[0], i), *expected = PyTuple_GetItem(args[1], i);
    PyObject* pointer = PyTuple_GetItem(args[2], i);
    int same = value == expected;
    if (pointer == Py_None) {
      // None is compared by identity: a tensor may have come in its place.
      if (!same && value != Py_None && expected != Py_None) same = PyObject_RichCompareBool(value, expected, Py_EQ);
    } else if (same) {
      PyObject* now = PyObject_CallMethodObjArgs(value, data_ptr, nullptr);
      if (now != nullptr) same = PyObject_RichCompareBool(now, pointer, Py_EQ);
      Py_XDECREF(now);
      now = now == nullptr || same <= 0 ? nullptr : PyObject_GetAttr(value, version);
      if (now != nullptr) same = PyObject_RichCompareBool(now, PyTuple_GetItem(args[3], i), Py_EQ);
      Py_XDECREF(now);
    }
    if (PyErr_Occurred()) return nullptr;
    if (!same) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(kernels->name); }

// select(name): use the kernels of another instruction set; "best" for what this CPU runs best.
PyObject* select(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (bytes == nullptr) return nullptr;
  const char* wanted = PyBytes_AsString(bytes);
  const Kernels* found = nullptr;
  const Kernels* fastest = best();
  if (std::strcmp(wanted, "best") == 0) found = fastest;
  if (std::strcmp(wanted, kGeneric.name) == 0) found = &kGeneric;
#if defined(__x86_64__)
  if (std::strcmp(wanted, kAvx2.name) == 0 && fastest != &kGeneric) found = &kAvx2;
  if (std::strcmp(wanted, kAvx512.name) == 0 && fastest == &kAvx512) found = &kAvx512;
#endif
  if (found != nullptr) kernels = found;
  else PyErr_Format(PyExc_ValueError, "found instruction set '%s'; this CPU runs nothing beyond '%s'", wanted, fastest->name);
  Py_DECREF(bytes);
  if (found == nullptr) return nullptr;
  Py_RETURN_NONE;
}

#define FASTCALL(name) {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(name)), METH_FASTCALL, nullptr}
#define PACKED(name, Params) {#name, packed<Params, &Kernels::name>, METH_O, nullptr}
PyMethodDef kMethods[] = {
    FASTCALL(mixer_step),
    FASTCALL(unchanged),
    PACKED(selective_scan, SelectiveScan),
    PACKED(causal_conv1d, CausalConv1d),
    PACKED(linear, Linear),
    PACKED(rms_norm_quant, RmsNormQuant),
    PACKED(hadamard_quant, HadamardQuant),
    {"isa", isa, METH_NOARGS, nullptr},
    {"select", select, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

// MEMBERS: the members of every op's struct, by the op's name.
int execute(PyObject* module) {
  PyObject* ops = PyDict_New();
  const bool done = ops != nullptr && add_members(ops, "mixer_step", kMixerStep) &&
                    add_members(ops, "selective_scan", kSelectiveScan) &&
                    add_members(ops, "causal_conv1d", kCausalConv1d) &&
                    add_members(ops, "linear", kLinear) &&
                    add_members(ops, "rms_norm_quant", kRmsNormQuant) &&
                    add_members(ops, "hadamard_quant", kHadamardQuant) &&
                    PyModule_AddObjectRef(module, "MEMBERS", ops) == 0;
  Py_XDECREF(ops);
  return done ? 0 : -1;
}

PyModuleDef_Slot kSlots[] = {{Py_mod_exec, reinterpret_cast<void*>(execute)}, {0, nullptr}};
PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "quamba._cpu", nullptr, 0, kMethods, kSlots, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModuleDef_Init(&kModule); }
