// A block's weights as its kernels take them, made in one launch; queued on the current stream.
#pragma once

#include <cstdint>

#include "../scan.h"

namespace vmamba::cuda {

struct BlockWeights {
    // count numbers of float32: cast, or with `decay` -exp of them in float32.
    struct Item {
        const float* from = nullptr;
        void* to = nullptr;
        int64_t count = 0;
        bool decay = false;
    };
    static constexpr int kMost = 8;

    Item items[kMost];
    int size = 0;
    Scalar dtype = Scalar::bf16;  // what is cast to; not float32
};

void prepare_block_weights(const BlockWeights& weights, int device);

}  // namespace vmamba::cuda
