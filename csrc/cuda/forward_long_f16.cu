#include "forward_long.cuh"

namespace vmamba::cuda {
template void long_forward<__half>(const ForwardArgs&, bool, cudaStream_t);
}
