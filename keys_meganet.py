# ### MEGANet
#
# Their network is `net`. A level of the backbone is `encoder1` to `encoder5`, of which the first is the stem; the reduction of level 3 is `x3_dem_1`, its head
# `out3`, the convolutions on the way up `up3`, the edge-guided attention `ega3`. Ours count from 0. Their `DoubleConv` is two blocks, ours one sequence of
# convolution, norm, ReLU, convolution, norm. Inside the attention `cbam` has its weights in `ChannelGate` and `SpatialGate`.

#| exporti
_meganet_keys = [
    (r'^encoder\.(conv|bn)1', r'encoder1_\1'), (r'^encoder\.layer(\d)', _next('encoder{}')), (r'^reduce\.(\d)', _next('x{}_dem_1')),
    (r'^up\.4', 'up5.0.conv'), (r'^up\.(\d)\.([0134])', lambda m: f'up{int(m[1]) + 1}.conv.{int(m[2])//3}.conv.{int(m[2])%3}'),
    (r'^heads\.(\d)\.0', _next('out{}.conv1.conv')), (r'^heads\.(\d)\.1', _next('out{}.conv2')),
    (r'^guide\.(\d)', _next('ega{}')), (r'\.fuse\.', '.fusion_conv.'), (r'\.mask\.', '.attention.'),
    (r'attend\.channels\.(\d)', _next('cbam.ChannelGate.mlp.{}')), (r'attend\.places', 'cbam.SpatialGate.spatial'), ('^', 'net.')]

published_networks['meganet'] = PublishedNetwork(partial(create_student, 'meganet', pretrained=False), _meganet_keys)
published_networks['meganet_r34'] = PublishedNetwork(partial(create_student, 'meganet', backbone='resnet34', pretrained=False), _meganet_keys)

# ----
test_eq(published_key('reduce.2.0.weight', _meganet_keys), 'net.x3_dem_1.0.weight')
test_eq(published_key('up.3.4.running_var', _meganet_keys), 'net.up4.conv.1.conv.1.running_var')
test_eq(published_key('guide.0.attend.channels.2.bias', _meganet_keys), 'net.ega1.cbam.ChannelGate.mlp.3.bias')
