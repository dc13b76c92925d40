// The kernels of upfirdn2d.cuh for half types, a file of their own for the compiler's time.

#include "upfirdn2d.cuh"

namespace fastgan {

template FirKernel fir_kernel_of<__half>(const FirPlan&, bool);
template FirKernel fir_kernel_of<__nv_bfloat16>(const FirPlan&, bool);

}  // namespace fastgan
