#include "forward.cuh"

namespace vmamba::cuda {
template void forward_pass<__half>(const ForwardArgs&, Pass, bool, cudaStream_t);
}
