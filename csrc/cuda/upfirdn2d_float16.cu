// The kernels of upfirdn2d.cuh for float16, in a file of their own for the compiler's time.

#include "upfirdn2d.cuh"

namespace fastgan {

template FirKernel fir_kernel_of<__half>(const FirPlan&, bool);

}  // namespace fastgan
