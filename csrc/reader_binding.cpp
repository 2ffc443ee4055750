// SPDX-License-Identifier: BSD-3-Clause
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "module.h"
#include "reader.h"
#include "switchgear/check.h"

namespace py = pybind11;

namespace switchgear {
namespace {

// A wait returns to Python as often, so that Ctrl-C and other signals arrive.
constexpr auto kSlice = std::chrono::milliseconds(50);

// Of a path or a message with one: paths need not be UTF-8.
py::object text_of(const std::string& bytes) {
  return py::reinterpret_steal<py::object>(
      PyUnicode_DecodeFSDefaultAndSize(bytes.data(), static_cast<Py_ssize_t>(bytes.size())));
}

// The exception ReadError with its attributes; `error` is an errno, 0 for none.
[[noreturn]] void raise(const std::string& message, const char* kind, const std::string& file, int64_t offset,
                        int64_t bytes, int error) {
  const py::object type = py::module_::import("switchgear._C").attr("ReadError");
  py::object raised = type(text_of(message));
  raised.attr("kind") = kind;
  raised.attr("file") = text_of(file);
  raised.attr("offset") = offset;
  raised.attr("nbytes") = bytes;
  if (error != 0) raised.attr("errno") = error;
  PyErr_SetObject(type.ptr(), raised.ptr());
  throw py::error_already_set();
}

[[noreturn]] void raise(const std::string& message, const char* kind) { raise(message, kind, "", 0, 0, 0); }

void raise_outcome(const Reader& reader, const ReadOutcome& outcome) {
  const std::string& file = reader.file(outcome.file);
  const std::string what = join(file, ": bytes ", outcome.offset, " to ", outcome.offset + outcome.bytes);
  const auto fail = [&](const char* kind, const std::string& reason, int error = 0) {
    raise(join(what, ": ", reason), kind, file, outcome.offset, outcome.bytes, error);
  };
  switch (outcome.status) {
    case ReadStatus::kDone: return;
    case ReadStatus::kShort: return fail("short", join("the file ends at ", outcome.at));
    case ReadStatus::kFailed:
      return fail("system", join(std::strerror(outcome.error), " at ", outcome.at), outcome.error);
    case ReadStatus::kChecksum:
      return fail("checksum", "expected the checksum that was written, got another: the bytes changed");
    case ReadStatus::kReplaced:
      return fail("replaced", "the file was replaced, truncated or written after it was opened");
    case ReadStatus::kCancelled: return fail("cancelled", "the read was cancelled");
    case ReadStatus::kClosed: return fail("closed", "the reader was closed before the read was done");
  }
}

// Calls a function of the reader without the GIL; its own exceptions become ReadErrors.
template <typename Function>
auto without_gil(Function&& function) {
  try {
    const py::gil_scoped_release release;
    return function();
  } catch (const ReaderOfOtherProcess& error) {
    raise(error.what(), "process");
  } catch (const ReaderClosed& error) {
    raise(error.what(), "closed");
  } catch (const TooManyTickets& error) {
    raise(error.what(), "tickets");
  } catch (const UnreadableFile& error) {
    raise(join(error.path, ": ", error.what()), "open", error.path, 0, 0, error.error);
  }
}

std::unique_ptr<Reader> open(std::vector<std::string> files, int threads, bool direct, int64_t chunk) {
  return without_gil([&] {
    return std::make_unique<Reader>(std::move(files),
                                    ReaderOptions{.threads = threads, .direct = direct, .chunk = chunk});
  });
}

using Record = std::tuple<int, int64_t, int64_t, std::optional<uint64_t>>;

int64_t submit(Reader& reader, const Record& record, uintptr_t address, bool urgent) {
  return without_gil([&] {
    return reader.submit({.file = std::get<0>(record),
                          .offset = std::get<1>(record),
                          .bytes = std::get<2>(record),
                          .address = reinterpret_cast<void*>(address),  // NOLINT
                          .checksum = std::get<3>(record),
                          .urgent = urgent});
  });
}

void wait(Reader& reader, int64_t ticket, double timeout) {
  using std::chrono::nanoseconds;
  SWITCHGEAR_CHECK(ValueError, timeout >= 0, "timeout: expected at least 0 seconds, got ", timeout);
  constexpr double kMost = 1e9;  // seconds: decades, and far from the end of the clock
  const auto until = std::chrono::steady_clock::now() +
                     std::chrono::duration_cast<nanoseconds>(std::chrono::duration<double>(std::min(timeout, kMost)));
  const std::shared_ptr<Read> read = without_gil([&] { return reader.find(ticket); });
  for (;;) {
    const nanoseconds left = until - std::chrono::steady_clock::now();
    const nanoseconds slice = std::clamp<nanoseconds>(left, nanoseconds(0), kSlice);
    if (const auto outcome = without_gil([&] { return reader.wait_for(read, slice); })) {
      return raise_outcome(reader, *outcome);
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (left <= kSlice) break;
  }
  PyErr_SetString(PyExc_TimeoutError, join("ticket ", ticket, ": expected the read to be done in ", timeout,
                                           " s; it goes on, and can be waited for again")
                                          .c_str());
  throw py::error_already_set();
}

}  // namespace

void define_reader(py::module_& m) {
  using namespace py::literals;
  m.attr("ReadError") = py::reinterpret_steal<py::object>(
      PyErr_NewExceptionWithDoc("switchgear._C.ReadError",
                                "A read of a record failed. kind: open, short, system, checksum, replaced, closed, "
                                "cancelled, process or tickets; "
                                "file, offset, nbytes: the record.",
                                PyExc_OSError, nullptr));
  m.def(
      "checksum",
      [](uintptr_t address, int64_t bytes) {
        SWITCHGEAR_CHECK(ValueError, bytes >= 0, "nbytes: expected at least 0, got ", bytes);
        SWITCHGEAR_CHECK(ValueError, address != 0 || bytes == 0, "address: expected one of memory, got 0");
        const py::gil_scoped_release release;
        return checksum(reinterpret_cast<const void*>(address), bytes);  // NOLINT
      },
      "The checksum of a record in memory, as Reader compares it.", "address"_a, "nbytes"_a);
  py::class_<Reader>(m, "Reader", initialises_in_new(), "Reads records of files into memory on threads of its own.")
      .def(py::init(&open), "files"_a, "threads"_a = ReaderOptions().threads, "direct"_a = true,
           "chunk"_a = ReaderOptions().chunk)
      .def("submit", &submit,
           "Starts to read a record, (file, offset, nbytes, checksum or None), to an address; its ticket.", "record"_a,
           "address"_a, "urgent"_a = true)
      .def("wait", &wait, "Waits for a read; ReadError if it failed, TimeoutError if it is not done in time.",
           "ticket"_a, "timeout"_a)
      .def(
          "is_done", [](Reader& reader, int64_t ticket) { return without_gil([&] { return reader.is_done(ticket); }); },
          "Whether a wait would return at once.", "ticket"_a)
      .def(
          "promote", [](Reader& reader, int64_t ticket) { without_gil([&] { reader.promote(ticket); }); },
          "Makes a guessed read urgent.", "ticket"_a)
      .def(
          "cancel", [](Reader& reader, int64_t ticket) { return without_gil([&] { return reader.cancel(ticket); }); },
          "Whether the read had not begun; then it never does.", "ticket"_a)
      .def(
          "statistics",
          [](Reader& reader) {
            const ReaderStatistics now = without_gil([&] { return reader.statistics(); });
            return std::tuple(now.bytes, now.reads, now.busy_seconds);
          },
          "Bytes, reads, and seconds in which a thread was reading.")
      .def(
          "is_direct", [](Reader& reader, int file) { return without_gil([&] { return reader.is_direct(file); }); },
          "Whether reads of a file go past the page cache.", "file"_a)
      .def(
          "close", [](Reader& reader) { without_gil([&] { reader.close(); }); },
          "Starts no further chunk of any read, and waits for those that threads are reading.");
}

}  // namespace switchgear
