// A C++ struct of arguments as a Python type: `Linear4bit(w=..., x=..., ...)` takes every member by name, none twice,
// none left out, so that no two integers can be swapped. Addresses can be set again later (`args.workspace = ...`).
// The constructor is a vectorcall, since a module makes one such call per product while decoding: names that come in
// the struct's order cost a comparison of pointers each.
#pragma once

#include <pybind11/pybind11.h>
// After Python's own header.
#include <structmember.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "deftcore/ops.h"

namespace deftcore::bindings {

// Whether T is a struct with DEFTCORE_FIELDS.
template <class T, class = void>
constexpr bool kIsRecord = false;
template <class T>
constexpr bool kIsRecord<T, std::void_t<decltype(T::kFields)>> = true;

// Whether T can be made of n values in braces: n members or more.
struct Anything {
  template <class U>
  operator U() const;
};
template <class T, size_t... kI>
auto takes(std::index_sequence<kI...>) -> decltype(T{(void(kI), Anything{})...}, std::true_type{});
template <class T, size_t...>
std::false_type takes(...);
template <class T, size_t kCount>
constexpr bool kTakes = decltype(takes<T>(std::make_index_sequence<kCount>{}))::value;

template <class T>
class Record {
  using Fields = decltype(std::declval<T&>().fields());
  static constexpr size_t kCount = std::tuple_size_v<Fields>;
  static_assert(kTakes<T, kCount> && !kTakes<T, kCount + 1>, "DEFTCORE_FIELDS must name every member");

  struct Object {
    PyObject base;
    T value;
  };

 public:
  // Puts the type into the module.
  static void add(pybind11::module_ m, std::string name) {
    if (type != nullptr) return;  // two ops may share their arguments
    split(T::kFields);
    full_name = "deftcore._C." + name;
    text = name + "(*, " + T::kFields + ")\n--\n\nArguments of a kernel, each by name.";
    list_addresses(std::make_index_sequence<kCount>{});
    members.push_back({});
    PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(&release)},
                           {Py_tp_members, members.data()},
                           {Py_tp_doc, text.data()},
                           {0, nullptr}};
    PyType_Spec spec{full_name.c_str(), sizeof(Object), 0,
                     Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE, slots};
    type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
    if (type == nullptr) throw pybind11::error_already_set();
    type->tp_vectorcall = &make;
    m.add_object(name.c_str(), reinterpret_cast<PyObject*>(type));
  }

  // The struct inside; null where it is another type.
  static T* from(PyObject* object) {
    return Py_TYPE(object) == type ? &reinterpret_cast<Object*>(object)->value : nullptr;
  }

 private:
  static inline PyTypeObject* type = nullptr;
  static inline std::vector<std::string> names;
  static inline std::vector<PyObject*> keys;  // the names as Python's own strings
  static inline std::vector<PyMemberDef> members;
  static inline std::string full_name, text;

  static void split(const std::string& fields) {
    for (size_t begin = 0; begin < fields.size();) {
      const size_t end = std::min(fields.find(", ", begin), fields.size());
      names.push_back(fields.substr(begin, end - begin));
      begin = end + 2;
    }
    for (const std::string& name : names) keys.push_back(PyUnicode_InternFromString(name.c_str()));
  }

  template <size_t... kI>
  static void list_addresses(std::index_sequence<kI...>) {
    T value{};
    const auto fields = value.fields();
    const auto list = [&](size_t i, auto& field) {
      if constexpr (std::is_pointer_v<std::remove_reference_t<decltype(field)>>) {
        const auto place = reinterpret_cast<char*>(&field) - reinterpret_cast<char*>(&value);
        static_assert(sizeof(void*) == sizeof(unsigned long long));
        members.push_back(
            {names[i].c_str(), T_ULONGLONG, static_cast<Py_ssize_t>(offsetof(Object, value)) + place, 0, nullptr});
      }
    };
    (list(kI, std::get<kI>(fields)), ...);
  }

  static void release(PyObject* self) {
    PyTypeObject* own = Py_TYPE(self);
    own->tp_free(self);
    Py_DECREF(own);
  }

  static PyObject* make(PyObject*, PyObject* const* args, size_t positional, PyObject* given) {
    const Py_ssize_t count = given == nullptr ? 0 : PyTuple_GET_SIZE(given);
    if (PyVectorcall_NARGS(positional) != 0 || count != static_cast<Py_ssize_t>(kCount)) {
      return PyErr_Format(PyExc_TypeError, "%s: takes its %zu fields by name (%s), got %zd and %zd by position",
                          type->tp_name, kCount, T::kFields, count, PyVectorcall_NARGS(positional));
    }
    PyObject* self = type->tp_alloc(type, 0);
    if (self == nullptr) return nullptr;
    if (fill(reinterpret_cast<Object*>(self)->value, args, given, std::make_index_sequence<kCount>{})) return self;
    Py_DECREF(self);
    return nullptr;
  }

  template <size_t... kI>
  static bool fill(T& value, PyObject* const* args, PyObject* given, std::index_sequence<kI...>) {
    const auto fields = value.fields();
    return (set(kI, std::get<kI>(fields), args, given) && ...);
  }

  template <class Field>
  static bool set(size_t i, Field& field, PyObject* const* args, PyObject* given) {
    const Py_ssize_t place = find(static_cast<Py_ssize_t>(i), given);
    if (place < 0) {
      PyErr_Format(PyExc_TypeError, "%s: needs %s (takes %s)", type->tp_name, names[i].c_str(), T::kFields);
      return false;
    }
    if (read(args[place], field)) return true;
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "%s: %s cannot be %R", type->tp_name, names[i].c_str(), args[place]);
    return false;
  }

  // Where a field's name stands among those given; most often in its own place.
  static Py_ssize_t find(Py_ssize_t i, PyObject* given) {
    PyObject* key = keys[static_cast<size_t>(i)];
    if (PyTuple_GET_ITEM(given, i) == key) return i;
    for (Py_ssize_t j = 0; j < PyTuple_GET_SIZE(given); ++j) {
      if (PyTuple_GET_ITEM(given, j) == key || PyUnicode_Compare(PyTuple_GET_ITEM(given, j), key) == 0) return j;
    }
    return -1;
  }

  // Python's conversions return -1 in case of an error, but not only then.
  template <class Number>
  static bool fits(Number number) {
    return number != static_cast<Number>(-1) || PyErr_Occurred() == nullptr;
  }

  // One value; false, or a Python error, where it does not fit.
  template <class Field>
  static bool read(PyObject* from, Field& to) {
    if constexpr (kIsRecord<Field>) {
      if (from == Py_None) return true;  // not there: all zero
      const Field* record = Record<Field>::from(from);
      if (record != nullptr) to = *record;
      return record != nullptr;
    } else if constexpr (std::is_same_v<Field, ScanTensor> || std::is_same_v<Field, HeadTensor>) {
      auto& [data, first, second, third] = to;
      return PyTuple_CheckExact(from) && PyTuple_GET_SIZE(from) == 4 && read(PyTuple_GET_ITEM(from, 0), data) &&
             read(PyTuple_GET_ITEM(from, 1), first) && read(PyTuple_GET_ITEM(from, 2), second) &&
             read(PyTuple_GET_ITEM(from, 3), third);
    } else if constexpr (std::is_pointer_v<Field>) {
      static_assert(sizeof(unsigned long) == sizeof(Field));
      if (!PyLong_Check(from)) return false;
      const unsigned long address = PyLong_AsUnsignedLong(from);
      to = reinterpret_cast<Field>(address);
      return fits(address);
    } else if constexpr (std::is_same_v<Field, bool>) {
      to = from == Py_True;
      return PyBool_Check(from);
    } else if constexpr (std::is_floating_point_v<Field>) {
      const double value = PyFloat_AsDouble(from);
      to = static_cast<Field>(value);
      return fits(value);
    } else if constexpr (std::is_enum_v<Field>) {
      const long code = PyLong_AsLong(from);
      to = static_cast<Field>(code);
      return fits(code);
    } else {
      static_assert(std::is_same_v<Field, int64_t>);
      to = PyLong_AsLongLong(from);
      return fits(to);
    }
  }
};

}  // namespace deftcore::bindings

// Functions bound by pybind11 take records as they are.
template <class T>
struct pybind11::detail::type_caster<T, std::enable_if_t<deftcore::bindings::kIsRecord<T>>> {
  static constexpr auto name = const_name("Record");
  template <class>
  using cast_op_type = const T&;

  bool load(handle source, bool) {
    value = deftcore::bindings::Record<T>::from(source.ptr());
    return value != nullptr;
  }
  operator const T&() const { return *value; }

 private:
  const T* value = nullptr;
};
