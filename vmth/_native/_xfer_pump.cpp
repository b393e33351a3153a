// SPDX-License-Identifier: Apache-2.0
// pybind11 over csrc/xfer/stream_pump.hpp.
#include "_xfer_pump.hpp"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wshadow"  // pybind11's own
#include <pybind11/stl.h>
#pragma GCC diagnostic pop

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "xfer/stream_pump.hpp"

namespace py = pybind11;

namespace vmth {

namespace {

// (why it stopped, the block that CONTINUE means, bytes read, bytes used, pages queued, bytes not read
// yet of them, ticket, what is left)
py::tuple run_pump(StreamPump &pump, const py::bytes &first, uint32_t block,
                   uint32_t round, int64_t time_ns, int64_t patience_ns, uint64_t pages,
                   uint64_t ahead_bytes, size_t piece_bytes)
{
    const std::string_view given = first;
    Pumped pumped;
    {
        py::gil_scoped_release release;
        pumped = pump.run(reinterpret_cast<const uint8_t *>(given.data()), given.size(), block,
                          round, {time_ns, patience_ns, pages, ahead_bytes, piece_bytes});
    }
    return py::make_tuple(static_cast<uint32_t>(pumped.stop), pumped.block, pumped.read_bytes,
                          pumped.used_bytes, pumped.pages, pumped.ahead_bytes, pumped.ticket,
                          py::bytes(reinterpret_cast<const char *>(pumped.left), pumped.left_bytes));
}

}  // namespace

void bind_pump(py::module_ &module)
{
    py::class_<StreamPump>(module, "StreamPump")
        .def(py::init([](Sender &sender, int fd, std::vector<uint64_t> lengths, const py::bytes &names,
                         size_t page_bytes, size_t piece_bytes, size_t npieces) {
                 return std::make_unique<StreamPump>(sender, fd, std::move(lengths),
                                                     std::string(names), page_bytes, piece_bytes,
                                                     npieces);
             }),
             py::arg("sender"), py::arg("fd"), py::arg("lengths"), py::arg("names"), py::arg("page_bytes"),
             py::arg("piece_bytes"), py::arg("npieces"), py::keep_alive<1, 2>())
        .def("run", &run_pump, py::arg("first"), py::arg("block"), py::arg("round_"),
             py::kw_only(), py::arg("time_ns"), py::arg("patience_ns"), py::arg("pages"),
             py::arg("ahead_bytes"), py::arg("piece_bytes"));
}

}  // namespace vmth
