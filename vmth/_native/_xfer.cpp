// SPDX-License-Identifier: Apache-2.0
// pybind11 over csrc/xfer: argument checks, GIL release, exception translation; nothing else.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wshadow"  // pybind11's own
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "_xfer_pump.hpp"
#include "sys/sock_options.h"
#include "vmth/kernels.h"
#include "xfer/receiver.hpp"
#include "xfer/sender.hpp"

namespace py = pybind11;

namespace {

using vmth::ErrorKind;
using vmth::TransferError;

using Words = py::array_t<uint64_t, py::array::c_style>;

// Threads are joined on destruction; none of them takes the GIL, and others may run meanwhile.
struct DeleteWithoutGil {
    template <typename T> void operator()(T *object) const
    {
        py::gil_scoped_release release;
        delete object;
    }
};
template <typename T> using Holder = std::unique_ptr<T, DeleteWithoutGil>;

TransferError usage(const std::string &message)
{
    return TransferError(ErrorKind::usage, message);
}

// (address, npages, mapped anew); address 0: hostless
using Blocks = std::vector<std::tuple<uintptr_t, uint64_t, bool>>;

std::vector<vmth::MemoryBlock> memory_blocks(const Blocks &blocks)
{
    std::vector<vmth::MemoryBlock> memory;
    memory.reserve(blocks.size());
    for (const auto &[address, npages, mapped_anew] : blocks) {
        memory.push_back({reinterpret_cast<uint8_t *>(address), npages, mapped_anew});
    }
    return memory;
}

// A C-contiguous uint64 array as it is: a converted copy would lose what is written to it.
Words words_of(const py::handle &object)
{
    if (!py::isinstance<Words>(object)) {
        throw usage("expected a C-contiguous uint64 array");
    }
    return py::reinterpret_borrow<Words>(object);
}

std::vector<vmth_run> runs_of(const py::handle &object)
{
    Words array = words_of(object);
    if (array.ndim() != 2 || array.shape(1) != 2) {
        throw usage("expected runs of shape (n, 2)");
    }
    std::vector<vmth_run> runs(static_cast<size_t>(array.shape(0)));
    for (size_t i = 0; i < runs.size(); i++) {
        runs[i] = {array.data()[2 * i], array.data()[2 * i + 1]};
    }
    return runs;
}

// Memory of single bytes, back to back, as it is.
py::buffer_info bytes_of(const py::buffer &object)
{
    py::buffer_info info = object.request();
    if (info.ndim != 1 || info.itemsize != 1 || (info.size > 1 && info.strides[0] != 1)) {
        throw usage("expected contiguous bytes");
    }
    return info;
}

using PageRuns = py::array_t<vmth_qemu_run, py::array::c_style>;

std::pair<size_t, uint64_t> send_pages(vmth::Sender &sender, const py::handle &runs,
                                       const py::buffer &data, uint32_t round)
{
    if (!py::isinstance<PageRuns>(runs)) {
        throw usage("expected a C-contiguous array of runs (vmth.qemu.ram.RUN)");
    }
    const PageRuns array = py::reinterpret_borrow<PageRuns>(runs);
    const py::buffer_info bytes = bytes_of(data);
    const vmth_qemu_run *first = array.data();
    const size_t nruns = static_cast<size_t>(array.size());
    const auto *content = static_cast<const uint8_t *>(bytes.ptr);
    const size_t nbytes = static_cast<size_t>(bytes.size);
    py::gil_scoped_release release;
    return sender.send_pages(first, nruns, content, nbytes, round);
}

Words array_of(std::vector<vmth_u128> &&hashes)
{
    auto owner = std::make_unique<std::vector<vmth_u128>>(std::move(hashes));
    auto *data = reinterpret_cast<uint64_t *>(owner->data());
    const py::ssize_t rows = static_cast<py::ssize_t>(owner->size());
    py::capsule keep(owner.get(), [](void *p) { delete static_cast<std::vector<vmth_u128> *>(p); });
    owner.release();
    return Words({rows, py::ssize_t{2}}, data, keep);
}

py::tuple digest_of(const vmth::HashTable &hashes)
{
    vmth_digest digest;
    {
        py::gil_scoped_release release;
        digest = hashes.total();
    }
    return py::make_tuple(digest.sum.lo, digest.sum.hi, digest.pages);
}

Words copy_hashes(const vmth::HashTable &hashes, uint32_t block, uint64_t page, uint64_t npages)
{
    std::vector<vmth_u128> copy;
    {
        py::gil_scoped_release release;
        copy = hashes.copy(block, page, npages);
    }
    return array_of(std::move(copy));
}

Words subdigests(const vmth::HashTable &hashes, uint32_t block, uint64_t page, uint64_t npages,
                 uint64_t step)
{
    std::vector<vmth_u128> sums;
    {
        py::gil_scoped_release release;
        sums = hashes.subdigests(block, page, npages, step);
    }
    return array_of(std::move(sums));
}

// Of the forms that a session may agree on: (pages, tried, content bytes, wire bytes, CPU ns)
py::dict forms_of(const vmth::Counters &counters)
{
    py::dict forms;
    for (unsigned form = 0; form < counters.forms.size(); form++) {
        if ((vmth::cheaper_forms >> form & 1) != 0) {
            const vmth::FormCounters &of = counters.forms[form];
            forms[vmth::form_name(form)] =
                py::make_tuple(of.pages.get(), of.tried_pages.get(), of.content_bytes.get(),
                               of.wire_bytes.get(), of.cpu_ns.get());
        }
    }
    return forms;
}

py::dict counters_of(const vmth::Counters &counters, const vmth::PathInfo &path)
{
    using namespace pybind11::literals;
    return py::dict(
        "normal_pages"_a = counters.normal_pages.get(), "zero_pages"_a = counters.zero_pages.get(),
        "hole_pages"_a = counters.hole_pages.get(), "free_pages"_a = counters.free_pages.get(),
        "missed_pages"_a = counters.missed_pages.get(),
        "written_pages"_a = counters.written_pages.get(),
        "wire_bytes"_a = counters.wire_bytes.get(),
        "acked_bytes"_a = counters.acked_bytes.get(), "packets"_a = counters.packets.get(),
        "torn_packets"_a = counters.torn_packets.get(),
        "zerocopy_sends"_a = counters.zerocopy_sends.get(),
        "zerocopy_copied"_a = counters.zerocopy_copied.get(), "cpu_ns"_a = counters.cpu_ns.get(),
        "forms"_a = forms_of(counters), "rtt_ns"_a = path.rtt_ns,
        "base_rtt_ns"_a = path.base_rtt_ns, "retransmits"_a = path.retransmits,
        "path_mtu"_a = path.path_mtu, "carrying_ns"_a = path.carrying_ns,
        "starved_ns"_a = path.starved_ns);
}

// (index, pages, packets, wire bytes, acknowledged bytes, acknowledged bytes/s, opening) of each channel
py::list channels_of(const std::vector<vmth::ChannelInfo> &infos)
{
    py::list channels;
    for (const vmth::ChannelInfo &of : infos) {
        channels.append(py::make_tuple(of.index, of.pages, of.packets, of.wire_bytes,
                                       of.acked_bytes, of.acked_bps, of.opening));
    }
    return channels;
}

std::unique_ptr<vmth::Sender, DeleteWithoutGil>
make_sender(const Blocks &blocks, size_t page_bytes, uint64_t hash_seed, bool digest, bool zerocopy,
            uint32_t packet_bytes, uint32_t fast_packet_bytes, unsigned queue_jobs, uint32_t forms,
            uint64_t dedup_index_bytes, uint64_t delta_cache_bytes, uint64_t kept_copies_bytes,
            const std::vector<size_t> &handed_on)
{
    vmth::SenderOptions options;
    options.hash_seed = hash_seed;
    options.digest = digest;
    options.zerocopy = zerocopy;
    options.packet_bytes = packet_bytes;
    options.fast_packet_bytes = fast_packet_bytes;
    options.queue_jobs = queue_jobs;
    options.forms = forms;
    options.dedup_index_bytes = dedup_index_bytes;
    options.delta_cache_bytes = delta_cache_bytes;
    options.kept_copies_bytes = kept_copies_bytes;
    std::vector<vmth::MemoryBlock> memory = memory_blocks(blocks);
    for (const size_t block : handed_on) {
        if (block >= memory.size()) {
            throw usage("handed_on: a block beyond the last");
        }
        memory[block].handed_on = true;
    }
    return Holder<vmth::Sender>(new vmth::Sender(std::move(memory), page_bytes, options));
}

// (fd, hashes, places, frames) of each file, and the arrays that stay alive as long as they are read.
struct ReuseSources {
    std::vector<vmth::StoreSource> sources;
    std::vector<Words> arrays;
};

ReuseSources reuse_sources(const py::sequence &files)
{
    ReuseSources result;
    for (const py::handle &item : files) {
        const auto file = py::cast<py::tuple>(item);
        const Words hashes = words_of(file[1]);
        const Words places = words_of(file[2]);
        const Words frames = words_of(file[3]);
        if (hashes.size() != 2 * places.size() || frames.size() % 4 != 0) {
            throw usage("hashes, places and frames do not fit one another");
        }
        vmth::StoreSource source;
        source.fd = py::cast<int>(file[0]);
        source.hashes = reinterpret_cast<const vmth_u128 *>(hashes.data());
        source.places = places.data();
        source.npages = static_cast<size_t>(places.size());
        source.frames = reinterpret_cast<const vmth::StoredFrame *>(frames.data());
        source.nframes = static_cast<size_t>(frames.size() / 4);
        result.sources.push_back(source);
        result.arrays.insert(result.arrays.end(), {hashes, places, frames});
    }
    return result;
}

const uint8_t *content_key(const py::bytes &key)
{
    const std::string_view view = key;
    if (view.size() != VMTH_CONTENT_KEY_BYTES) {
        throw usage("content key of " + std::to_string(view.size()) + " bytes, allowed " +
                    std::to_string(VMTH_CONTENT_KEY_BYTES));
    }
    return reinterpret_cast<const uint8_t *>(view.data());
}

// (base, count, data, last): the next part for the wire.
py::tuple next_part(vmth::FilterWriter &writer)
{
    vmth::FilterWriter::Part part;
    {
        py::gil_scoped_release release;
        part = writer.next();
    }
    return py::make_tuple(part.base, part.count,
                          py::bytes(reinterpret_cast<const char *>(part.data.data()),
                                    part.data.size()),
                          part.last);
}

// (fd, section id, idstrs as they are on the wire)
using Sink = std::optional<std::tuple<int, uint32_t, std::vector<std::string>>>;

// (fd, offset of page 0) of the file that each block's memory is; fd -1: none
using Files = std::vector<std::pair<int, uint64_t>>;

std::unique_ptr<vmth::Receiver, DeleteWithoutGil>
make_receiver(const Blocks &blocks, size_t page_bytes, uint64_t hash_seed, bool digest,
              const py::sequence &maybe_nonzero, unsigned channels, const Sink &sink,
              uint32_t forms, const py::sequence &reuse, const py::bytes &reuse_key,
              const Files &memory_files)
{
    std::vector<vmth::MemoryBlock> memory = memory_blocks(blocks);
    if (!memory_files.empty() && memory_files.size() != memory.size()) {
        throw usage(std::to_string(memory_files.size()) + " memory files, allowed none or " +
                    std::to_string(memory.size()));
    }
    for (size_t i = 0; i < memory_files.size(); i++) {
        std::tie(memory[i].fd, memory[i].offset) = memory_files[i];
    }
    vmth::ReceiverOptions options;
    options.hash_seed = hash_seed;
    options.digest = digest;
    options.channels = channels;
    options.forms = forms;
    if (sink) {
        std::tie(options.sink.fd, options.sink.section_id, options.sink.idstrs) = *sink;
    }
    const ReuseSources files = reuse_sources(reuse);
    if (!files.sources.empty()) {
        options.reuse = files.sources;
        std::copy_n(content_key(reuse_key), VMTH_CONTENT_KEY_BYTES, options.reuse_key);
    }
    std::vector<Words> arrays;
    std::vector<const uint64_t *> words;
    std::vector<size_t> nwords;
    for (const py::handle &item : maybe_nonzero) {
        arrays.push_back(words_of(item));
        words.push_back(arrays.back().data());
        nwords.push_back(static_cast<size_t>(arrays.back().size()));
    }
    return Holder<vmth::Receiver>(
        new vmth::Receiver(std::move(memory), page_bytes, options, words, nwords));
}

uint64_t take_missed(vmth::Sender &sender, const py::sequence &bitmaps)
{
    std::vector<Words> arrays;
    std::vector<uint64_t *> words;
    std::vector<size_t> nwords;
    for (const py::handle &item : bitmaps) {
        arrays.push_back(words_of(item));
        words.push_back(arrays.back().mutable_data());
        nwords.push_back(static_cast<size_t>(arrays.back().size()));
    }
    py::gil_scoped_release release;
    return sender.take_missed(words, nwords);
}

py::list take_missed_pages(vmth::Sender &sender)
{
    py::list pages;
    for (const vmth::MissedCopy &page : sender.take_missed_pages()) {
        const auto *content = reinterpret_cast<const char *>(page.content.data());
        pages.append(py::make_tuple(page.block, page.page, py::bytes(content, page.content.size())));
    }
    return pages;
}

void send_told(vmth::Sender &sender, vmth_page_form form, uint32_t block, const py::handle &runs,
               uint32_t round)
{
    std::vector<vmth_run> list = runs_of(runs);
    py::gil_scoped_release release;
    sender.send_told(form, block, std::move(list), round);
}

void connect_options(int fd, int dscp, int keepalive_s, int user_timeout_ms, int send_buffer_bytes,
                     int receive_buffer_bytes)
{
    const vmth_sock_options options = {dscp, keepalive_s, user_timeout_ms, send_buffer_bytes,
                                       receive_buffer_bytes};
    const char *option = "";
    int result = vmth_sock_set_options(fd, &options, &option);
    if (result == -EINVAL) {
        throw TransferError(ErrorKind::usage, std::string(option) + " is outside its range",
                            -result);
    }
    if (result != 0) {
        throw vmth::system_error(option, -result);
    }
}

py::dict tcp_info(int fd)
{
    using namespace pybind11::literals;
    vmth_sock_info info;
    int result = vmth_sock_get_info(fd, &info);
    if (result != 0) {
        throw vmth::system_error("tcp_info", -result);
    }
    return py::dict("tcp"_a = info.tcp, "rtt_ns"_a = info.rtt_ns,
                    "base_rtt_ns"_a = info.base_rtt_ns, "rttvar_ns"_a = info.rttvar_ns,
                    "retransmits"_a = info.retransmits, "path_mtu"_a = info.path_mtu,
                    "congestion_window"_a = info.congestion_window,
                    "delivery_bps"_a = info.delivery_bps, "busy_ns"_a = info.busy_ns,
                    "peer_full_ns"_a = info.peer_full_ns);
}

void select_kernel(const std::string &family, const std::string &name)
{
    int result = vmth_kernel_select(family.c_str(), name.c_str());
    if (result != 0) {
        throw TransferError(ErrorKind::usage, "kernel " + family + "=" + name + " does not run here",
                            -result);
    }
}

std::string selected_kernel(const std::string &family)
{
    const char *name = vmth_kernel_selected(family.c_str());
    if (name == nullptr) {
        throw usage("kernel family " + family + " is unknown");
    }
    return name;
}

// Lives as long as the module; holds the Python type of TransferError.
PYBIND11_CONSTINIT py::gil_safe_call_once_and_store<py::object> error_type;

void translate(std::exception_ptr pointer)
{
    try {
        if (pointer) {
            std::rethrow_exception(pointer);
        }
    } catch (const TransferError &error) {
        py::object type = error_type.get_stored();
        py::object instance = type(py::str(error.what()));
        instance.attr("kind") = vmth::kind_name(error.kind());
        instance.attr("errno") = error.error();
        PyErr_SetObject(type.ptr(), instance.ptr());
    }
}

void bind_sender(py::module_ &module)
{
    using Release = py::call_guard<py::gil_scoped_release>;
    using vmth::Sender;
    py::class_<Sender, Holder<Sender>>(module, "Sender")
        .def(py::init(&make_sender), py::arg("blocks"), py::arg("page_bytes"), py::kw_only(),
             py::arg("hash_seed"), py::arg("digest") = true, py::arg("zerocopy") = true,
             py::arg("packet_bytes") = 262144, py::arg("fast_packet_bytes") = 0,
             py::arg("queue_jobs") = 2, py::arg("forms") = 0,
             py::arg("dedup_index_bytes") = 64u << 20, py::arg("delta_cache_bytes") = 256u << 20,
             py::arg("kept_copies_bytes") = 64u << 20,
             py::arg("handed_on") = std::vector<size_t>())
        .def(
            "begin_reuse",
            [](Sender &self, const py::bytes &key, uint64_t entries) {
                self.begin_reuse(content_key(key), entries);
            },
            py::arg("key"), py::arg("entries"))
        .def(
            "add_reuse",
            [](Sender &self, uint64_t base, uint64_t count, const py::bytes &data, bool last) {
                const std::string_view view = data;
                py::gil_scoped_release release;
                self.add_reuse(base, count, reinterpret_cast<const uint8_t *>(view.data()),
                               view.size(), last);
            },
            py::arg("base"), py::arg("count"), py::arg("data"), py::arg("last"))
        .def("add_channel", &Sender::add_channel, py::arg("fd"), py::arg("index"),
             py::arg("trip_ns") = 0, Release())
        .def(
            "send",
            [](Sender &self, uint32_t block, uint64_t page, uint64_t npages, const py::object &bitmap,
               uint32_t round) {
                Words words = words_of(bitmap);
                const uint64_t *data = words.data();
                const size_t nwords = static_cast<size_t>(words.size());
                py::gil_scoped_release release;
                self.send(block, page, npages, data, nwords, round);
            },
            py::arg("block"), py::arg("page"), py::arg("npages"), py::arg("bitmap"),
            py::arg("round_"))
        .def("send_pages", &send_pages, py::arg("runs"), py::arg("data"), py::arg("round_"))
        .def("pages_read", &Sender::pages_read, Release())
        .def("wait_read", &Sender::wait_read, py::arg("ticket"), py::arg("timeout_ns"), Release())
        .def(
            "send_holes",
            [](Sender &self, uint32_t block, const py::object &runs, uint32_t round) {
                send_told(self, VMTH_FORM_HOLE, block, runs, round);
            },
            py::arg("block"), py::arg("runs"), py::arg("round_"))
        .def(
            "send_free",
            [](Sender &self, uint32_t block, const py::object &runs, uint32_t round) {
                send_told(self, VMTH_FORM_FREE, block, runs, round);
            },
            py::arg("block"), py::arg("runs"), py::arg("round_"))
        .def("sent", &Sender::sent, py::arg("round_"), py::arg("timeout_ns"), Release())
        .def("barriers", &Sender::barriers)
        .def("barrier", &Sender::barrier, py::arg("round_"), py::arg("timeout_ns"), Release())
        .def("take_missed", &take_missed, py::arg("bitmaps"))
        .def("take_missed_pages", &take_missed_pages)
        .def("digest", [](const Sender &self) { return digest_of(self.hashes()); })
        .def(
            "hashes",
            [](const Sender &self, uint32_t block, uint64_t page, uint64_t npages) {
                return copy_hashes(self.hashes(), block, page, npages);
            },
            py::arg("block"), py::arg("page"), py::arg("npages"))
        .def(
            "subdigests",
            [](const Sender &self, uint32_t block, uint64_t page, uint64_t npages, uint64_t step) {
                return subdigests(self.hashes(), block, page, npages, step);
            },
            py::arg("block"), py::arg("page"), py::arg("npages"), py::arg("step"))
        .def("counters",
             [](const Sender &self) {
                 py::dict counters = counters_of(self.counters(), self.path_info());
                 counters["channels"] = channels_of(self.channel_infos());
                 return counters;
             })
        .def("set_bandwidth", &Sender::set_bandwidth, py::arg("bytes_per_second"), Release())
        .def(
            "set_forms",
            [](Sender &self, uint32_t mask, int zstd_level) { self.set_forms({mask, zstd_level}); },
            py::arg("mask"), py::arg("zstd_level"), Release())
        .def("forget", &Sender::forget, py::arg("block"), py::arg("page"), py::arg("npages"),
             Release())
        .def("set_window", &Sender::set_window, py::arg("nbytes"), Release())
        .def("in_flight", &Sender::in_flight, Release())
        .def("fallbacks", &Sender::fallbacks)
        .def("cancel", &Sender::cancel, py::arg("reason"), Release())
        .def("finish", &Sender::finish, Release())
        .def("close", &Sender::close, Release());
}

void bind_receiver(py::module_ &module)
{
    using Release = py::call_guard<py::gil_scoped_release>;
    using vmth::Receiver;
    py::class_<Receiver, Holder<Receiver>>(module, "Receiver")
        .def(py::init(&make_receiver), py::arg("blocks"), py::arg("page_bytes"), py::kw_only(),
             py::arg("hash_seed"), py::arg("digest") = true, py::arg("maybe_nonzero"),
             py::arg("channels"), py::arg("sink") = py::none(), py::arg("forms") = 0,
             py::arg("reuse") = py::tuple(), py::arg("reuse_key") = py::bytes(),
             py::arg("memory_files") = Files())
        .def("attach", &Receiver::attach, py::arg("fd"), py::arg("index"), Release())
        .def("wait", &Receiver::wait, py::arg("timeout_ns"), Release())
        .def("wait_barriers", &Receiver::wait_barriers, py::arg("count"), py::arg("timeout_ns"),
             Release())
        .def("digest", [](const Receiver &self) { return digest_of(self.hashes()); })
        .def(
            "hashes",
            [](const Receiver &self, uint32_t block, uint64_t page, uint64_t npages) {
                return copy_hashes(self.hashes(), block, page, npages);
            },
            py::arg("block"), py::arg("page"), py::arg("npages"))
        .def(
            "subdigests",
            [](const Receiver &self, uint32_t block, uint64_t page, uint64_t npages,
               uint64_t step) { return subdigests(self.hashes(), block, page, npages, step); },
            py::arg("block"), py::arg("page"), py::arg("npages"), py::arg("step"))
        .def("counters", [](const Receiver &self) { return counters_of(self.counters(), {}); })
        .def("reused", &Receiver::reused)
        .def("fallbacks", &Receiver::fallbacks)
        .def("cancel", &Receiver::cancel, py::arg("reason"), Release())
        .def("close", &Receiver::close, Release());
}

// What a destination's files have, for the wire. The arrays belong to the caller.
void bind_filter(py::module_ &module)
{
    using vmth::FilterWriter;
    py::class_<FilterWriter>(module, "FilterWriter")
        .def(py::init([](const py::sequence &files) {
                 return std::make_unique<FilterWriter>(reuse_sources(files).sources);
             }),
             py::arg("files"), py::keep_alive<1, 2>())
        .def_property_readonly("entries", &FilterWriter::entries)
        .def("next", &next_part);
}

}  // namespace

PYBIND11_MODULE(_xfer, module)
{
    module.doc() = "Page channels: sender and receiver worker pools over stream sockets.";
    error_type.call_once_and_store_result([&module]() -> py::object {
        const std::string name = std::string(py::str(module.attr("__name__"))) + ".TransferError";
        return py::reinterpret_steal<py::object>(
            PyErr_NewException(name.c_str(), PyExc_Exception, nullptr));
    });
    module.attr("TransferError") = error_type.get_stored();
    PYBIND11_NUMPY_DTYPE(vmth_qemu_run, page, npages, at, stride, nbytes, block, kind);
    py::register_exception_translator(&translate);
    bind_sender(module);
    vmth::bind_pump(module);
    bind_receiver(module);
    bind_filter(module);
    module.def("connect_options", &connect_options, py::arg("fd"), py::kw_only(),
               py::arg("dscp") = -1, py::arg("keepalive_s") = 0, py::arg("user_timeout_ms") = 0,
               py::arg("send_buffer_bytes") = 0, py::arg("receive_buffer_bytes") = 0);
    module.def("tcp_info", &tcp_info, py::arg("fd"));
    module.def("select_kernel", &select_kernel, py::arg("family"), py::arg("name"));
    module.def("selected_kernel", &selected_kernel, py::arg("family"));
}
