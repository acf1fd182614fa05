// libFuzzer's entry, for the target that the compiler is told of: -DFUZZ_TARGET=fuzz_channel.

#include "fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    FUZZ_TARGET(data, size);
    return 0;
}
