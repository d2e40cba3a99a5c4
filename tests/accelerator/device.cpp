// An accelerator in ordinary memory, as strict as a real one: its operations run the CPU's kernels on its tensors, and
// refuse tensors of the CPU. Registered as torch's PrivateUse1; `device.py` builds it and gives it a name.
// With ACCELERATOR_STREAMS in the environment it has streams, events and page-locked memory: as late as a real one may be,
// it makes copies between the host and the device on other streams than the default one only when they are waited for.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <chrono>
#include <cstdlib>
#include <deque>
#include <functional>
#include <mutex>
#include <set>

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Sizes = c10::IntArrayRef;
using SymSizes = c10::SymIntArrayRef;
using WithoutAutograd = c10::impl::ExcludeDispatchKeyGuard;

static const at::Device DEVICE(at::kPrivateUse1, 0);
static int64_t operations = 0, copies = 0, late_copies = 0;

// Streams. The default one, number 0, runs everything at once.

struct SideStream {
  std::deque<std::function<void()>> pending;
  int64_t begun = 0;     // copies run so far
  int64_t computed = 0;  // operations on the default stream that it has waited for
};
struct Mark {
  c10::StreamId stream;
  int64_t copies;    // on a side stream, those asked for before
  int64_t computed;  // on the default stream, the operations before
  std::chrono::steady_clock::time_point time;
};
static const bool has_streams = std::getenv("ACCELERATOR_STREAMS") != nullptr;
static std::recursive_mutex lock;
static std::deque<SideStream> streams(1);
static int64_t computed = 0;
static thread_local c10::StreamId current = 0;

static int64_t asked(c10::StreamId stream) { return streams[stream].begun + (int64_t)streams[stream].pending.size(); }

static void run_until(c10::StreamId stream, int64_t end) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  while (streams[stream].begun < end) {
    auto copy = std::move(streams[stream].pending.front());
    streams[stream].pending.pop_front();
    streams[stream].begun++;
    copy();
  }
}

static void run_all(c10::StreamId stream) { run_until(stream, asked(stream)); }

// In the order of the current stream, the next operation comes now.
static void take_turn() {
  if (current == 0) computed++;
  else run_all(current);
}

// Memory, and what torch asks of any device.

struct Memory final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* begin = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {begin, begin, &c10::free_cpu, DEVICE};
  }
  at::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
static Memory memory;

struct PageLocked final : at::Allocator {
  static inline std::set<const void*> known;
  static void free(void* begin) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    known.erase(begin);
    c10::free_cpu(begin);
  }
  at::DataPtr allocate(size_t bytes) override {
    TORCH_CHECK(has_streams, "no page-locked memory");
    void* begin = c10::alloc_cpu(bytes + 1);
    std::lock_guard<std::recursive_mutex> guard(lock);
    known.insert(begin);
    return {begin, begin, &free, at::kCPU};
  }
  at::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
static PageLocked page_locked;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr at::DeviceType static_type = at::kPrivateUse1;
  at::DeviceType type() const override { return static_type; }
  at::Device exchangeDevice(at::Device) const override { return DEVICE; }
  at::Device getDevice() const override { return DEVICE; }
  void setDevice(at::Device) const override {}
  void uncheckedSetDevice(at::Device) const noexcept override {}
  c10::Stream getStream(at::Device) const noexcept override {
    return c10::Stream(c10::Stream::UNSAFE, DEVICE, current);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    auto former = getStream(DEVICE);
    current = stream.id();
    return former;
  }
  c10::Stream getNewStream(at::Device, int) const override {
    TORCH_CHECK(has_streams, "no streams");
    std::lock_guard<std::recursive_mutex> guard(lock);
    streams.emplace_back();
    return c10::Stream(c10::Stream::UNSAFE, DEVICE, (c10::StreamId)streams.size() - 1);
  }
  at::DeviceIndex deviceCount() const noexcept override { return 1; }
  void synchronizeDevice(const at::DeviceIndex) const override {
    for (size_t stream = 1; stream < streams.size(); stream++) run_all((c10::StreamId)stream);
  }
  bool queryStream(const c10::Stream& stream) const override { return streams[stream.id()].pending.empty(); }
  void synchronizeStream(const c10::Stream& stream) const override { run_all(stream.id()); }

  void record(void** event, const c10::Stream& stream, const at::DeviceIndex, const c10::EventFlag) const override {
    TORCH_CHECK(has_streams, "no events");
    if (!*event) *event = new Mark();
    *static_cast<Mark*>(*event) = {stream.id(), asked(stream.id()), computed, std::chrono::steady_clock::now()};
  }
  void block(void* event, const c10::Stream& stream) const override {
    auto* mark = static_cast<Mark*>(event);
    if (mark->stream != 0) run_until(mark->stream, mark->copies);
    else streams[stream.id()].computed = mark->computed;
  }
  bool queryEvent(void* event) const override {
    auto* mark = static_cast<Mark*>(event);
    return streams[mark->stream].begun >= mark->copies;
  }
  void synchronizeEvent(void* event) const override {
    auto* mark = static_cast<Mark*>(event);
    run_until(mark->stream, mark->copies);
  }
  double elapsedTime(void* first, void* second, const at::DeviceIndex) const override {
    auto length = static_cast<Mark*>(second)->time - static_cast<Mark*>(first)->time;
    return std::chrono::duration<double, std::milli>(length).count();
  }
  void destroyEvent(void* event, const at::DeviceIndex) const noexcept override { delete static_cast<Mark*>(event); }
};
static c10::impl::DeviceGuardImplRegistrar guard_registrar(at::kPrivateUse1, new Guard());

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  at::DeviceIndex deviceCount() const override { return 1; }
  const at::Generator& getDefaultGenerator(at::DeviceIndex) const override {
    static at::Generator generator = at::detail::getDefaultCPUGenerator();
    return generator;
  }
  at::Generator getNewGenerator(at::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &page_locked; }
  bool isPinnedPtr(const void* begin) const override {
    std::lock_guard<std::recursive_mutex> guard(lock);
    return PageLocked::known.count(begin) > 0;
  }
};
static bool hooked = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

// Between the two kinds of tensors.

static bool is_ours(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == at::kPrivateUse1; }

static void refuse(const char* operation) {
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but ", operation, " got the accelerator and cpu");
}

// The same memory, seen as the CPU's.
static Tensor as_cpu(const Tensor& tensor) {
  auto storage = c10::Storage(
      c10::Storage::use_byte_size_t(), tensor.storage().nbytes(),
      at::DataPtr(tensor.storage().mutable_data(), at::kCPU), c10::GetAllocator(at::kCPU), true);
  auto seen = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  seen.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  seen.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  return seen;
}

static void copy_now(const Tensor& from, const Tensor& to) {
  WithoutAutograd guard(c10::autograd_dispatch_keyset);
  Tensor written = is_ours(to) ? as_cpu(to) : to;
  written.copy_(is_ours(from) ? as_cpu(from) : from);
}

// On a side stream, later; until then, whoever asked has to keep the memory of both.
static void copy_later(const Tensor& from, const Tensor& to) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  late_copies++;
  if (is_ours(from))
    TORCH_CHECK(streams[current].computed == computed, "a stream copies what it has not waited for");
  c10::weak_intrusive_ptr<c10::TensorImpl> kept_from(from.getIntrusivePtr()), kept_to(to.getIntrusivePtr());
  streams[current].pending.push_back([kept_from, kept_to] {
    auto first = kept_from.lock(), second = kept_to.lock();
    TORCH_CHECK(first && second, "the memory of a copy was given up before the copy was made");
    copy_now(Tensor(first), Tensor(second));
  });
}

static Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  copies++;
  const Tensor& host = is_ours(from) ? to : from;
  if (non_blocking && current != 0 && !is_ours(host) && host.is_pinned()) {
    copy_later(from, to);
  } else {
    run_all(current);
    copy_now(from, to);
  }
  return to;
}

static Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (from.sizes() != to.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

static Tensor to_device(const Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  Tensor moved = at::empty(tensor.sizes(), tensor.options().device(DEVICE));
  copy_from(tensor, moved, false);
  return moved;
}

// What has a kernel of its own: making tensors, and views of them.

static Tensor empty(
    Sizes sizes, std::optional<at::ScalarType> type, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(sizes, &memory, keys, at::dtype_or_default(type), format);
}

static Tensor empty_strided(
    Sizes sizes, Sizes strides, std::optional<at::ScalarType> type, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(sizes, strides, &memory, keys, at::dtype_or_default(type));
}

static Tensor& set_storage(Tensor& tensor, at::Storage storage, int64_t offset, Sizes sizes, Sizes strides) {
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  tensor.unsafeGetTensorImpl()->set_storage_offset(offset);
  return tensor;
}

static Tensor& set_whole_storage(Tensor& tensor, at::Storage storage) {
  int64_t count = storage.nbytes() / tensor.itemsize();
  return set_storage(tensor, storage, 0, {count}, {1});
}

static const Tensor& resize(const Tensor& tensor, Sizes sizes, std::optional<at::MemoryFormat>) {
  size_t needed = (c10::multiply_integers(sizes) + tensor.storage_offset()) * tensor.itemsize();
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  if (needed > storage->nbytes()) {
    auto larger = memory.allocate(needed);
    if (storage->nbytes()) std::memcpy(larger.get(), tensor.storage().data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(larger));
    storage->set_nbytes(needed);
  }
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return tensor;
}

static void record_stream(Tensor&, at::Stream) {}  // memory freed is given back at once: no stream can still use it

// Everything else: the CPU's kernel, on arguments that must be ours.

static c10::IValue argument_on_cpu(const c10::IValue& given, const std::string& operation) {
  const bool indexes = operation.find("index") != std::string::npos;  // these take indices from the CPU
  auto on_cpu = [&](const Tensor& tensor) -> Tensor {
    if (!tensor.defined()) return tensor;
    if (is_ours(tensor)) return as_cpu(tensor);
    if (tensor.dim() > 0 && !indexes && tensor.device().type() == at::kCPU) refuse(operation.c_str());
    return tensor;
  };
  if (given.isTensor()) return on_cpu(given.toTensor());
  if (given.isDevice()) return at::Device(at::kCPU);
  if (given.isTensorList()) {
    std::vector<Tensor> list;
    for (const Tensor& tensor : given.toTensorVector()) list.push_back(on_cpu(tensor));
    return list;
  }
  if (given.isOptionalTensorList()) {
    c10::List<MaybeTensor> list;
    for (MaybeTensor tensor : given.toOptionalTensorList())
      list.push_back(tensor ? MaybeTensor(on_cpu(*tensor)) : tensor);
    return list;
  }
  return given;
}

static bool is_written(const c10::Argument& argument) { return argument.alias_info() && argument.alias_info()->isWrite(); }

static c10::IValue result_on_device(
    const c10::IValue& result, const c10::Argument& returned, const std::vector<c10::Argument>& arguments,
    const std::vector<c10::IValue>& given) {
  if (is_written(returned))  // it is one of the arguments
    for (size_t i = 0; i < arguments.size(); i++)
      if (is_written(arguments[i]) && *arguments[i].alias_info() == *returned.alias_info()) return given[i];
  if (result.isTensor()) return to_device(result.toTensor());
  if (!result.isTensorList()) return result;
  std::vector<Tensor> list;
  for (const Tensor& tensor : result.toTensorVector()) list.push_back(to_device(tensor));
  return list;
}

static void fallback(const c10::OperatorHandle& operation, c10::DispatchKeySet, torch::jit::Stack* stack) {
  operations++;
  take_turn();
  const auto& arguments = operation.schema().arguments();
  const auto& returns = operation.schema().returns();
  std::vector<c10::IValue> given(stack->end() - arguments.size(), stack->end()), used;
  stack->resize(stack->size() - arguments.size());
  for (const auto& value : given) used.push_back(argument_on_cpu(value, operation.schema().name()));
  stack->insert(stack->end(), used.begin(), used.end());
  {
    WithoutAutograd guard(c10::autograd_dispatch_keyset);
    operation.callBoxed(stack);
  }
  for (size_t i = 0; i < arguments.size(); i++) {  // an output that the kernel resized
    if (!is_written(arguments[i]) || !given[i].isTensor() || !given[i].toTensor().defined()) continue;
    const Tensor &to = given[i].toTensor(), &from = used[i].toTensor();
    if (to.data_ptr() == from.data_ptr() && to.sizes() == from.sizes()) continue;
    to.resize_(from.sizes());
    copy_from(from, to, false);
  }
  for (size_t i = 0; i < returns.size(); i++) {
    c10::IValue& result = (*stack)[stack->size() - returns.size() + i];
    result = result_on_device(result, returns[i], arguments, given);
  }
}

// Convolutions reach a device by operations that the CPU does not have.

static Tensor ours_on_cpu(const Tensor& tensor) {
  if (!is_ours(tensor)) refuse("convolution");
  return as_cpu(tensor);
}

static Tensor convolution(
    const Tensor& input, const Tensor& weight, const MaybeTensor& bias, SymSizes stride, SymSizes padding,
    SymSizes dilation, bool transposed, SymSizes output_padding, c10::SymInt groups) {
  operations++;
  take_turn();
  MaybeTensor bias_on_cpu;
  if (bias && bias->defined()) bias_on_cpu = ours_on_cpu(*bias);
  WithoutAutograd guard(c10::autograd_dispatch_keyset);
  return to_device(at::convolution_symint(
      ours_on_cpu(input), ours_on_cpu(weight), bias_on_cpu, stride, padding, dilation, transposed, output_padding,
      groups));
}

static std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, SymSizes stride, SymSizes padding,
    SymSizes dilation, bool transposed, SymSizes output_padding, c10::SymInt groups, std::array<bool, 3> wanted) {
  operations++;
  take_turn();
  WithoutAutograd guard(c10::autograd_dispatch_keyset);
  std::vector<c10::SymInt> bias{transposed ? weight.sym_size(1) * groups : weight.sym_size(0)};
  auto [of_input, of_weight, of_bias] = at::convolution_backward_symint(
      ours_on_cpu(gradient), ours_on_cpu(input), ours_on_cpu(weight), std::optional<SymSizes>(bias), stride, padding,
      dilation, transposed, output_padding, groups, wanted);
  return {to_device(of_input), to_device(of_weight), to_device(of_bias)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("set_.source_Storage", set_whole_storage);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("resize_", resize);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("record_stream", record_stream);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", at::native::_reshape_alias);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {  // the macros expect this name
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("operations", [] { return operations; });
  module.def("copies", [] { return copies; });
  module.def("late_copies", [] { return late_copies; });
}
