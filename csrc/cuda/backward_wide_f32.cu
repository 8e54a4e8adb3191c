#include "backward_wide.cuh"

namespace vmamba::cuda {
template void backward_wide_pass<float>(const BackwardArgs&, Pass, cudaStream_t);
}
