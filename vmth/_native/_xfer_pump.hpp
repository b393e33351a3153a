// SPDX-License-Identifier: Apache-2.0
// The part of the module _xfer that is about csrc/xfer/stream_pump.hpp.
#ifndef VMTH_NATIVE_XFER_PUMP_HPP
#define VMTH_NATIVE_XFER_PUMP_HPP

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wshadow"  // pybind11's own
#include <pybind11/pybind11.h>
#pragma GCC diagnostic pop

namespace vmth {

// After the class Sender was bound.
void bind_pump(pybind11::module_ &module);

}  // namespace vmth

#endif
