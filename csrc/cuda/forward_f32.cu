#include "forward.cuh"

namespace vmamba::cuda {
template void forward_pass<float>(const ForwardArgs&, Pass, bool, cudaStream_t);
}
